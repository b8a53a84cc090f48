"""A soak: mixed load through a real server and client, whose connection is cut again and again.

    python3 .ci/soak.py [SECONDS]

Small, large, streamed and upgraded exchanges, uploads, visitors who go away and visitors who send
nonsense; every second or so the connection between the two ends is reset or closed.  Nothing may
fail; afterwards no stream, no visitor, no window and no descriptor may be left, and memory must
not have grown since the first third.  Then the same for a shorter time with an inspector, which may
keep as much as it says and no more.  Standard library only; needs /proc.
"""

import asyncio
import collections
import contextlib
import hashlib
import os
import random
import re
import subprocess
import sys
import tempfile
import urllib.request

TOOL = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'localtunnel.py')
PATTERN = hashlib.shake_128(b'soak').digest(2 << 20)
DEADLINE = 60           # seconds for one exchange; a cut that is noticed late costs 15 of them
SETTLE = 10             # seconds for everything to be given back after a round
ROUNDS = 3
GROWN = 8 << 20         # bytes: what allocators do between the first round and the last
KEPT = 64 << 20         # bytes: what the inspector keeps at most
NONSENSE = [b'\x16\x03\x01\0', b'GET  / HTTP/1.1\r\n\r\n', b'x' * 70000, b'\0' * 300,
            b'GET / HTTP/1.1\r\nHost: x.localhost\r\nA : b\r\n\r\n',
            b'PUT / HTTP/1.1\r\nHost: x.localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n',
            b'GET / HTTP/1.1\r\nHost: x.localhost\r\nContent-Length: 1\r\n'
            b'Transfer-Encoding: chunked\r\n\r\n']

ENDS = OSError, asyncio.IncompleteReadError, asyncio.CancelledError     # of a connection
failures = []
done = collections.Counter()


# The app.

async def app(reader, writer):
    """/N is N bytes, /slow comes in pieces, a body is answered with its hash, an upgrade echoes."""
    with contextlib.suppress(*ENDS):
        while True:
            head = await reader.readuntil(b'\r\n\r\n')
            path = head.split()[1].decode().strip('/')
            if b'Upgrade:' in head:
                writer.write(b'HTTP/1.1 101 x\r\nConnection: Upgrade\r\nUpgrade: e\r\n\r\n')
                while True:
                    data = await reader.read(65536)
                    if not data:
                        return writer.close()
                    writer.write(data)
                    await writer.drain()
            if path == 'slow':
                writer.write(b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n')
                for number in range(10):
                    writer.write(b'1\r\n%d\r\n' % number)
                    await asyncio.sleep(0.1)
                writer.write(b'0\r\n\r\n')
                continue
            length = re.search(rb'Content-Length: ([0-9]+)', head)
            body = await reader.readexactly(int(length.group(1))) if length else b''
            answer = hashlib.sha256(body).digest() if body else PATTERN[:int(path)]
            writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b' % (len(answer), answer))
            await writer.drain()


# Between the two ends.

class Relay:
    """What the client dials; `cut` breaks all that goes through."""

    def __init__(self, port):
        self.port, self.writers = port, set()

    async def accept(self, reader, writer):
        try:
            there = await asyncio.open_connection('127.0.0.1', self.port)
        except OSError:
            return writer.transport.abort()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(self.pump(reader, there[1]), self.pump(there[0], writer))

    async def pump(self, reader, writer):
        self.writers.add(writer)
        with contextlib.suppress(*ENDS):
            while True:
                data = await reader.read(1 << 17)
                if not data:
                    break
                writer.write(data)
                await writer.drain()
        writer.close()
        self.writers.discard(writer)

    def cut(self):
        end = random.choice(('abort', 'close'))
        for writer in tuple(self.writers):
            getattr(writer.transport, end)()


# The visitors.

async def ask(port, text, body=b'', fields=''):
    """(reader, writer) of one request."""
    reader, writer = await asyncio.open_connection('127.0.0.1', port)
    length = f'Content-Length: {len(body)}\r\n' if body else ''
    writer.write(f'{text} HTTP/1.1\r\nHost: x.localhost\r\n{length}{fields}\r\n'.encode() + body)
    return reader, writer


async def answer(reader, writer):
    """(status, body) of its answer."""
    head = await reader.readuntil(b'\r\n\r\n')
    body, length = b'', re.search(rb'(?i)content-length: ([0-9]+)', head)
    if length:
        body = await reader.readexactly(int(length.group(1)))
    while not length:
        size = int(await reader.readline(), 16)
        body += (await reader.readexactly(size + 2))[:-2]
        if not size:
            break
    writer.close()
    return int(head.split()[1]), body


async def small(port):
    expect(await answer(*await ask(port, 'GET /9')), (200, PATTERN[:9]))


async def large(port):
    expect(await answer(*await ask(port, f'GET /{len(PATTERN)}')), (200, PATTERN))


async def slow(port):
    expect(await answer(*await ask(port, 'GET /slow')), (200, b'0123456789'))


async def upload(port):
    body = PATTERN[:random.randrange(1, len(PATTERN))]
    expect(await answer(*await ask(port, 'POST /', body)), (200, hashlib.sha256(body).digest()))


async def upgraded(port):
    reader, writer = await ask(port, 'GET /', fields='Connection: Upgrade\r\nUpgrade: e\r\n')
    expect((await reader.readuntil(b'\r\n\r\n')).split()[1], b'101')
    for _ in range(100):
        message = PATTERN[:random.choice((1, 300, 70000))]
        writer.write(message)
        expect(await reader.readexactly(len(message)), message)
        await asyncio.sleep(0.02)
    writer.close()


async def aborted(port):
    reader, writer = await ask(port, f'GET /{len(PATTERN)}')
    await reader.read(random.randrange(1, 300000))
    writer.transport.abort()


async def malformed(port):
    reader, writer = await asyncio.open_connection('127.0.0.1', port)
    writer.write(random.choice(NONSENSE))
    expect((await reader.read(10))[:10], b'HTTP/1.1 4')
    writer.close()


def expect(found, wanted):
    if found != wanted:
        raise AssertionError(f'{str(found)[:200]} is not {str(wanted)[:50]}')


async def again_and_again(visit, port, until):
    loop = asyncio.get_running_loop()
    while loop.time() < until:
        try:
            await asyncio.wait_for(visit(port), DEADLINE)
            done[visit.__name__] += 1
        except (AssertionError, OSError, EOFError, ValueError, asyncio.TimeoutError) as e:
            failures.append(f'{visit.__name__}: {e!r}')
        await asyncio.sleep(random.uniform(0, 0.1))


# What is looked at.

def memory(process):
    with open(f'/proc/{process.pid}/statm', encoding='ascii') as f:
        return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def descriptors(process):
    return len(os.listdir(f'/proc/{process.pid}/fd'))


def left_over(admin):
    """What the server still holds: {gauge: value}, of those that must be 0."""
    with urllib.request.urlopen(f'http://127.0.0.1:{admin}/metrics', timeout=5) as page:
        found = re.findall(r'localtunnel_(streams|visitors|held_requests|window_bytes) ([0-9]+)',
                           page.read().decode())
    return {name: int(value) for name, value in found if value != '0'}


async def settled(admin, processes, first):
    """Wait until all was given back; what was not, as text."""
    for _ in range(SETTLE * 2):
        await asyncio.sleep(0.5)
        now = [descriptors(p) for p in processes]
        left = await asyncio.get_running_loop().run_in_executor(None, left_over, admin)
        if not left and all(a <= b for a, b in zip(now, first)):
            return
    failures.append(f'left over: {left}; descriptors were {first}, are {now}')


async def soak(seconds, folder, *options, before=None, may_grow=GROWN):
    """A client with OPTIONS carries load for SECONDS; return what memory both ends had at first.

    It may grow from there, or from BEFORE.
    """
    upstream = await asyncio.start_server(app, '127.0.0.1', 0)
    port, admin = free_port(), free_port()
    relay = Relay(port)
    door = await asyncio.start_server(relay.accept, '127.0.0.1', 0)
    environment = {**os.environ, 'XDG_CONFIG_HOME': folder, 'PYTHONDONTWRITEBYTECODE': '1'}
    processes = []

    def start(*words):
        log = open(os.path.join(folder, words[0] + '.log'), 'w+b')
        processes.append(subprocess.Popen([sys.executable, TOOL, *map(str, words)],
                                          stdout=log, stderr=log, env=environment))
    start('server', '--port', port, '--admin', admin, '--state', folder)
    start('client', port_of(upstream), '--name', 'x', '--server',
          f'http://localhost:{port_of(door)}', *options)
    try:
        await until_it_answers(port)
        first, grown = [descriptors(p) + 1 for p in processes], []      # one pooled, or a relay's
        for number in range(ROUNDS):
            until = asyncio.get_running_loop().time() + seconds / ROUNDS
            visits = [small] * 6 + [large, slow, upload, upgraded, upgraded, aborted, malformed]
            load = [asyncio.ensure_future(again_and_again(v, port, until)) for v in visits]
            while not all(task.done() for task in load):
                await asyncio.sleep(random.uniform(0.3, 2))
                relay.cut()
            await settled(admin, processes, first)
            grown.append([memory(p) for p in processes])
            print(f'round {number + 1}: {dict(done)}, memory of server and client',
                  ' and '.join(f'{m >> 10} KiB' for m in grown[-1]), flush=True)
        if any(b > a + may_grow for a, b in zip(before or grown[0], grown[-1])):
            failures.append(f'memory grew with {options}: {before} {grown}')
    finally:
        for process in processes:
            process.terminate()
            process.wait(DEADLINE)
    for name in ('server', 'client'):
        with open(os.path.join(folder, name + '.log'), encoding='utf-8') as f:
            failures.extend(re.findall('Traceback.*|.*[a-z]Error:.*', f.read()))
    return grown[0]


async def until_it_answers(port):
    for _ in range(DEADLINE * 10):
        with contextlib.suppress(OSError, EOFError, AssertionError):
            return await small(port)
        await asyncio.sleep(0.1)
    raise SystemExit('the tunnel did not come up')


def port_of(server):
    return server.sockets[0].getsockname()[1]


def free_port():
    import socket
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]


if __name__ == '__main__':
    lasts = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryDirectory() as another:
        first = asyncio.run(soak(lasts, place, '--no-inspect'))
        asyncio.run(soak(lasts / 3, another, '--inspect', 0, before=first, may_grow=GROWN + KEPT))
    for failure, times in collections.Counter(failures).most_common(20):
        print(f'FAILED {times} times: {failure}')
    sys.exit(1 if failures or not done else 0)
