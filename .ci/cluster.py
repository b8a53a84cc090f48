"""Several servers behind a real HAProxy, as README says, under load: what fails, and for how long.

    python3 .ci/cluster.py [SERVERS]        (2)

Sixty tunnels, every third with a chosen name, are visited all the time: by GET, once more where the
connection breaks before an answer and HAProxy can't repeat it.  Meanwhile a server is killed,
returns, is told to end, returns, a new one is added, and HAProxy is reloaded; first where HAProxy
ends TLS, then where it passes TLS on.  Nothing may fail, no visitor may see a 404, no client may
lose its name, and each name must answer within three seconds.  Standard library only; needs haproxy
and openssl.
"""

import asyncio
import collections
import contextlib
import itertools
import os
import random
import re
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOOL = os.path.join(HERE, 'localtunnel.py')
TUNNELS, RATE = 60, 240         # requests a second, of all together
LASTS = 5                       # seconds of load after each event
DEADLINE = 30                   # for a request, and for anything to come up
GOAL = 3.0                      # seconds until every name has answered


def clients(server, folder):
    """The other process: all tunnels; their hosts go to stdout, and the end of each."""
    sys.path.insert(0, HERE)
    import localtunnel as lt
    tunnels = []
    for number in range(TUNNELS):
        site = os.path.join(folder, f'site{number}')
        os.mkdir(site)
        tunnels.append(lt.tunnel(
            site, server=server, token='t', ca=os.path.join(folder, 'cert.pem'),
            name=None if number % 3 else f'chosen{number}',
            on_state=lambda state: state == 'ended' and print('ended', flush=True)))
        tunnels[-1].start()
        print(tunnels[-1].url.partition('://')[2], flush=True)
    sys.stdin.read()
    os._exit(0)


def free_ports(count):
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(('127.0.0.1', 0))
        return [sock.getsockname()[1] for sock in socks]


class Cluster:
    """HAProxy, `count` servers and one that comes later, and the process with the tunnels."""

    def __init__(self, folder, count, passes):
        self.folder, self.passes, self.processes = folder, passes, {}
        self.front, self.plain, *ports = free_ports(4 + 2 * count)
        self.ports, self.checked = ports[:count + 1], ports[count + 1:] if passes else ports
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith('LOCALTUNNEL_')},
            'XDG_CONFIG_HOME': folder, 'PYTHONDONTWRITEBYTECODE': '1'}
        cert, key = self.path('cert.pem'), self.path('key.pem')
        subprocess.run(['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt',
                        'ec_paramgen_curve:P-256', '-nodes', '-subj', '/CN=x', '-addext',
                        'subjectAltName=DNS:t.localhost,DNS:*.t.localhost', '-out', cert,
                        '-keyout', key], check=True, capture_output=True)
        with open(self.path('pem'), 'w') as f:
            f.write(open(cert).read() + open(key).read())
        with open(self.path('cluster.key'), 'wb', opener=lambda p, f: os.open(p, f, 0o600)) as f:
            f.write(subprocess.check_output([sys.executable, TOOL, 'server', '--make-cluster-key']))
        for number in range(count):
            self.node(number)
        self.start('haproxy', 'haproxy', '-W', '-db', '-f', self.configuration())
        until_open(self.front)
        self.start('clients', sys.executable, __file__, 'clients',
                   f'https://t.localhost:{self.front}', folder)
        self.hosts = self.wait_for_hosts()

    def path(self, name):
        return os.path.join(self.folder, name)

    def start(self, name, *words):
        log = open(self.path(f'{name}.log'), 'ab')
        self.processes[name] = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=log, stderr=log, env=self.environment)

    def reload(self):
        """As systemd does: another HAProxy takes over, the old one goes on with the sessions."""
        self.processes['haproxy'].send_signal(signal.SIGUSR2)

    def node(self, number):
        port = str(self.ports[number])
        more = ['--port', port, '--trust-proxy', '127.0.0.1']
        if self.passes:
            more = ['--port', str(self.checked[number]), '--tls-port', port, '--cert',
                    self.path('cert.pem'), '--key', self.path('key.pem')]
        self.start(number, sys.executable, TOOL, 'server', '--domain', 't.localhost', '--bind',
                   '127.0.0.1', '--token', 't', '--cluster-key', self.path('cluster.key'),
                   '--state', self.path(f'state{number}'), *more)
        until_open(int(port))

    def end(self, number, how):
        self.processes[number].send_signal(how)
        if how == signal.SIGKILL:
            self.processes[number].wait()

    def configuration(self):
        """README's, with the places of these."""
        with open(os.path.join(HERE, 'README.md'), encoding='utf-8') as f:
            text, passing, *_ = re.findall('```haproxy\n(.*?)```', f.read(), re.DOTALL)
        if self.passes:
            text = text[:text.index('frontend web')] + passing
        text = re.sub('    server [abc] .*\n', '', text) + ''.join(
            f'    server n{number} 127.0.0.1:{port} check port {checked} tcp-ut 3s\n'
            for number, (port, checked) in enumerate(zip(self.ports, self.checked)))
        for old, new in ((':80,[::]:80 v6only', f'127.0.0.1:{self.plain}'),
                         (':443,[::]:443 v6only', f'127.0.0.1:{self.front}'),
                         ('127.0.0.1:10000', self.path('peers')),
                         ('/etc/haproxy/t.example.com.pem', self.path('pem'))):
            text = text.replace(old, new)
        with open(self.path('haproxy.cfg'), 'w') as f:
            f.write(text)
        return f.name

    def wait_for_hosts(self):
        until = time.monotonic() + DEADLINE
        while time.monotonic() < until:
            with open(self.path('clients.log')) as f:
                hosts = f.read().split()
            if len(hosts) == TUNNELS:
                return hosts
            time.sleep(0.1)
        raise SystemExit(f'only {len(hosts)} tunnels came up')

    def lost(self):
        """How many clients have ended."""
        with open(self.path('clients.log')) as f:
            return f.read().split().count('ended')

    def close(self):
        for process in self.processes.values():
            process.kill()
            process.wait()


def until_open(port):
    for _ in range(DEADLINE * 20):
        with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port)):
            return
        time.sleep(0.05)
    raise SystemExit(f'nobody listens on port {port}')


class Load:
    """Visits all names, one after the other."""

    def __init__(self, cluster):
        self.cluster, self.done, self.under_way = cluster, [], set()
        self.tls = ssl.create_default_context(cafile=cluster.path('cert.pem'))

    async def run(self):
        loop = asyncio.get_running_loop()
        began = loop.time()
        for number, host in enumerate(itertools.chain.from_iterable(
                random.sample(self.cluster.hosts, TUNNELS) for _ in itertools.count())):
            await asyncio.sleep(began + number / RATE - loop.time())
            task = asyncio.ensure_future(self.visit(host))
            self.under_way.add(task)
            task.add_done_callback(self.under_way.discard)

    async def visit(self, host):
        began, said = time.monotonic(), ''
        for _ in range(1 + self.cluster.passes):
            try:
                said = await asyncio.wait_for(self.ask(host), DEADLINE)
                break
            except (OSError, EOFError, asyncio.TimeoutError) as e:
                said = type(e).__name__
        self.done.append((began, time.monotonic(), host, said))

    async def ask(self, host):
        reader, writer = await asyncio.open_connection(
            '127.0.0.1', self.cluster.front, ssl=self.tls, server_hostname=host.partition(':')[0])
        try:
            writer.write(f'GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n'.encode())
            return (await reader.readuntil(b'\r\n\r\n'))[9:12].decode()
        finally:
            writer.transport.abort()

    async def through(self, event):
        """(requests, failures by kind, seconds until all have answered) from EVENT on."""
        self.done.clear()
        at = time.monotonic()
        await asyncio.get_running_loop().run_in_executor(None, event)
        await asyncio.sleep(LASTS)
        if self.under_way:
            await asyncio.wait(set(self.under_way), timeout=DEADLINE)
        first = {}
        for began, ended, host, said in self.done:
            if began >= at and said == '200':
                first[host] = min(ended - at, first.get(host, DEADLINE))
        failed = collections.Counter(said for *_, said in self.done if said != '200')
        return len(self.done), failed, max(
            first.get(host, DEADLINE) for host in self.cluster.hosts)


async def prove(count, passes, folder):
    """Print a line for each event; return whether all goals are reached."""
    cluster, good = Cluster(folder, count, passes), True
    load = Load(cluster)
    running = asyncio.ensure_future(load.run())
    try:
        for name, event in (
                ('nothing', lambda: None), ('killed', lambda: cluster.end(0, signal.SIGKILL)),
                ('returned', lambda: cluster.node(0)),
                ('told to end', lambda: cluster.end(1, signal.SIGTERM)),
                ('returned', lambda: cluster.node(1)), ('added', lambda: cluster.node(count)),
                ('reloaded', cluster.reload)):
            requests, failed, seconds = await load.through(event)
            good &= not failed and seconds < GOAL and not cluster.lost()
            print(f'| {count} | {"passed on" if passes else "ended"} | {name} | {requests} '
                  f'| {sum(failed.values())} {dict(failed) or ""} | {failed["404"]} '
                  f'| {seconds:.2f} | {cluster.lost()} |', flush=True)
    finally:
        running.cancel()
        cluster.close()
    return good


if __name__ == '__main__':
    if sys.argv[1:2] == ['clients']:
        clients(*sys.argv[2:])
    servers = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    print('| servers | TLS | event | requests | failed | 404 | seconds until all answer | lost |')
    results = []
    for passed_on in (False, True):
        with tempfile.TemporaryDirectory() as place:
            results.append(asyncio.run(prove(servers, passed_on, place)))
    sys.exit(not all(results))
