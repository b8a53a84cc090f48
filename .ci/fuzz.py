"""Fuzzes what reads bytes from strangers: frames, heads, chunked bodies, DNS, mail.

    python3 .ci/fuzz.py [SECONDS] [SEED]

Random bytes and damaged real input, cut into pieces at random places.  What may come out: a result,
ProtocolError, or BadHttp, and the same one however the bytes were cut.  Never any other error, and
never memory that grows.  Needs hypothesis; `.ci/run` brings it.
"""

import asyncio
import gc
import io
import os
import sys
import time
import tracemalloc
import types
import unittest.mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from hypothesis import HealthCheck, given, seed, settings      # noqa: E402
from hypothesis import strategies as st                        # noqa: E402

import localtunnel as lt                                       # noqa: E402

EXAMPLES = 200          # of a property in one round; rounds follow each other until time is up
ENDLESS_BYTES = 4 << 20     # of anything that never ends, or so many pieces of it
ENDLESS_PIECES = 20_000
FLAT = 512 << 10        # bytes that reading it may hold: a head or a frame, and what finds its end
KEPT = 1 << 18          # bytes that may stay allocated by localtunnel.py after a round

loop = asyncio.new_event_loop()
runtime = lt.Runtime(loop)


# Input: whole messages, damaged ones, and noise; and the places where it is cut.

def damaged(whole):
    """Bytes of WHOLE, some of them replaced, removed, doubled or cut off."""
    hostile = st.sampled_from([b'\r', b'\n', b'\r\n', b'\0', b' ', b':', b'\xff', b'0', b'-', b'+',
                               b'\x0b', b'\t', b';', b',', b'chunked', b'\r\n\r\n', b''])
    edit = st.tuples(st.integers(0, 1 << 16), st.integers(0, 4), st.binary(max_size=4) | hostile)

    def apply(data, edits):
        for at, remove, insert in edits:
            at %= len(data) + 1
            data = data[:at] + insert + data[at + remove:]
        return data
    return st.builds(apply, whole, st.lists(edit, max_size=4))


cuts = st.lists(st.integers(1, 50), max_size=30)


def pieces(data, sizes):
    """DATA in pieces of SIZES, and then the rest."""
    at = 0
    for size in sizes:
        if at < len(data):
            yield data[at:at + size]
        at += size
    if at < len(data):
        yield data[at:]


kinds = st.sampled_from([*lt.KIND_NAMES, lt.OPEN | lt.END, lt.DATA | lt.END, lt.PING | lt.END,
                         0, 99])
payloads = st.binary(max_size=20) | st.sampled_from([bytes(2), bytes(4), bytes(8), b'\xff' * 8])
frames = st.lists(st.builds(lt.encode_frame, kinds, st.integers(0, 3), payloads),
                  max_size=6).map(b''.join)

token = st.sampled_from([
    b'Host', b'host', b'Content-Length', b'Transfer-Encoding', b'Connection', b'Upgrade', b'Expect',
    b'TE', b'Via', b'X-Forwarded-For', b'X_Forwarded_For', b'Forwarded', b'Cookie', b'X', b'A\xe9'])
value = st.sampled_from([
    b'example.com', b'example.com:80', b'[::1]:8000', b'a@b', b'0', b'5', b'05', b'+5', b'-1',
    b'0x5', b'5, 5', b'9' * 30, b'chunked', b'Chunked', b'chunked, chunked', b'gzip, chunked',
    b'identity', b'close', b'keep-alive, Upgrade', b'host', b'x-forwarded-for', b'websocket',
    b'', b'\xe9', b'100-continue', b' \t']) | st.binary(max_size=12)
lines = st.lists(st.tuples(token, st.sampled_from([b': ', b':', b' : ', b'']), value).map(b''.join),
                 max_size=6).map(lambda found: b''.join(line + b'\r\n' for line in found))
method = st.sampled_from([b'GET', b'POST', b'HEAD', b'OPTIONS', b'CONNECT', b'PRI', b'get', b'G(T'])
target = st.sampled_from([b'/', b'*', b'/a%00?b#c', b'http://example.com', b'http://example.com?q',
                          b'example.com:80', b'//x', b'http://a@b/', b'\xff', b''])
target |= st.binary(max_size=9)
version = st.sampled_from([b'HTTP/1.1', b'HTTP/1.0', b'HTTP/2.0', b'HTTP/1.10', b'http/1.1', b''])
requests = st.builds(b'%b %b %b\r\n%b\r\n'.__mod__, st.tuples(method, target, version, lines))
status = st.sampled_from([b'200', b'100', b'101', b'204', b'304', b'999', b'099', b'20', b'2000'])
reason = st.sampled_from([b' OK', b'', b' ', b' \xe9', b' a\x00b'])
responses = st.builds(b'%b %b%b\r\n%b\r\n'.__mod__, st.tuples(version, status, reason, lines))

extension = st.sampled_from([b'', b'', b';a', b' ; a="b"', b';' * 50])
chunk = st.tuples(st.binary(min_size=1, max_size=40), extension)
trailers = st.lists(st.sampled_from([b'A: b\r\n', b'Digest: x\r\n', b'a:\r\n']),
                    max_size=3).map(b''.join)

SHORT = lt.SIZE_BEFORE
zone = lt.Zone('t.example')
zone.texts |= {'a' * 43, 'b' * 43}
names = st.sampled_from([lt.encode_name(name) for name in (
    zone.name, zone.name.upper(), f'x.{zone.name}', 't.example', 'x' * 63, 'a.' * 126)]) | st.just(
        b'\0') | st.just(b'\xc0\x0c') | st.binary(max_size=9)
numbers = st.sampled_from([0, 1, 2, 5, 6, 16, 28, 41, 255, 257, 512, 0x8000, 0x0100, 0xffff])
fields = st.lists(numbers, max_size=6).map(lambda some: b''.join(map(SHORT.pack, some)))
header = st.builds(lt.DNS_HEADER.pack, numbers, st.sampled_from([0, 0x0100, 0x8180, 0x2800]),
                   *[st.sampled_from([0, 1, 1, 2])] * 4)
mails = st.lists(st.sampled_from([
    b'Subject: =?utf-8?q?=C3=A4?=\r\n', b'MIME-Version: 1.0\r\n', b'\r\n', b'text\r\n', b'..\r\n',
    b'Content-Type: multipart/mixed; boundary=x\r\n\r\n--x\r\n', b'--x\r\n', b'--x--\r\n',
    b'Content-Type: text/html; charset*=utf-8\'\'utf-8\r\n',
    b'Content-Type: message/rfc822\r\n\r\n',
    b'Content-Transfer-Encoding: base64\r\n\r\nYQ==\r\n', b'\r\n.\r\n', b'.\r\n', b'\n.\r\n',
    b'Content-Disposition: attachment; filename*0*=utf-8\'\'a; filename*1="b"\r\n']),
    max_size=9).map(b''.join)
packets = st.builds(bytes.__add__, header, st.lists(st.builds(
    bytes.__add__, names, fields), max_size=4).map(b''.join))


# Properties.

def decode(fed):
    """The frames of the pieces FED, or None where they break the protocol."""
    decoder, found = lt.Decoder(), []
    try:
        for piece in fed:
            found += decoder.feed(piece)
    except lt.ProtocolError:
        return None
    return found


@given(damaged(frames) | st.binary(max_size=200), cuts)
def frame_decoder(data, sizes):
    """However cut: the same frames, which encode to what was fed, or ProtocolError."""
    found = decode([data])
    assert decode(pieces(data, sizes)) == found
    if found is not None:
        assert data.startswith(b''.join(lt.encode_frame(*frame) for frame in found))


def run_with(coroutine, stream, fed):
    """The result of COROUTINE, which reads STREAM, into which the pieces FED come; then it ends."""
    fed = iter(fed)
    while True:
        try:
            coroutine.send(None)
        except StopIteration as done:
            return done.value
        piece = next(fed, None)
        if piece is None:
            stream.feed_eof()
        else:
            stream.feed_data(piece)


def head_of(fed, parse):
    """What reading and parsing a head does: its start line and fields, a status, or a word."""
    stream = lt.ByteStream(runtime)
    try:
        head = run_with(lt.read_head(stream, 60), stream, fed)
        if head is None:
            return 'nothing'
        message = parse(head)
        message.hop_by_hop()
        if isinstance(message, lt.Request):
            return message.block, message.length, message.upgrade, message.keep_alive
        return message.block, message.body_length(b"GET"), message.status, message.keep_alive
    except lt.BadHttp as e:
        assert 400 <= e.status < 600
        return e.status
    except lt.Incomplete:
        return 'incomplete'


@given(damaged(requests) | st.binary(max_size=200), cuts)
def request_head(data, sizes):
    """However cut: the same request, or BadHttp, or not all of it."""
    whole = head_of([data], lt.parse_request)
    cut = head_of(pieces(data, sizes), lt.parse_request)
    assert cut == whole or {type(cut), type(whole)} == {int}     # some faults have two names


@given(damaged(responses) | st.binary(max_size=200), cuts)
def response_head(data, sizes):
    """However cut: the same response, or BadHttp, or not all of it."""
    whole = head_of([data], lt.parse_response)
    cut = head_of(pieces(data, sizes), lt.parse_response)
    assert cut == whole or {type(cut), type(whole)} == {int}


@given(damaged(requests) | requests | responses | st.binary(max_size=200))
def parsers_alone(data):
    """The parsers raise BadHttp and nothing else, also for what read_head would not give them."""
    for parse in (lt.parse_request, lt.parse_response):
        try:
            message = parse(data)
            message.hop_by_hop()
            if parse is lt.parse_response:
                message.body_length(b'HEAD')
        except lt.BadHttp:
            pass


def chunked(fed):
    """(bytes, trailers, how it ended, what is left) of the chunked body in the pieces FED."""
    stream = lt.ByteStream(runtime)
    body, found, end = lt.ChunkedBody(stream), b'', 'incomplete'
    try:
        for piece in fed:
            stream.feed_data(piece)
            taken = body.take()
            while taken:
                found += taken
                taken = body.take()
            if body.finished:
                end = 'whole'
    except lt.BadHttp:
        return b'', b'', 'refused', b''     # how much was taken before depends on how it came
    return found, body.trailers, end, stream.peek() if end == 'whole' else b''


def encode_chunks(chunks, trailers):
    """A chunked body of CHUNKS, each with its extension."""
    coded = b''.join(b'%x%b\r\n%b\r\n' % (len(data), ext, data) for data, ext in chunks)
    return coded + b'0\r\n' + trailers + b'\r\n'


@given(st.lists(chunk, max_size=6), trailers, cuts, st.binary(max_size=5))
def chunks_arrive(chunks, trailers, sizes, rest):
    """A proper body: every byte, the trailers, and not a byte of what follows."""
    expected = b''.join(data for data, _ in chunks), trailers, 'whole', rest
    assert chunked(pieces(encode_chunks(chunks, trailers) + rest, sizes)) == expected


@given(damaged(st.builds(encode_chunks, st.lists(chunk, max_size=6), trailers))
       | st.binary(max_size=200), cuts)
def chunk_reader(data, sizes):
    """However cut: the same body, or BadHttp, or not all of it."""
    assert chunked(pieces(data, sizes)) == chunked([data])


@given(damaged(packets) | packets | st.binary(max_size=99))
def zone_answers(packet):
    """Nothing, or a whole answer to this very question, of which no byte is too much."""
    answer = zone.answer(packet)
    if answer:
        id, flags, *counts = lt.DNS_HEADER.unpack_from(answer)
        labels, at = lt.read_labels(packet, lt.DNS_HEADER.size)
        assert SHORT.pack(id) == packet[:2] and flags & lt.IS_ANSWER and counts[0] == 1
        assert answer[12:at + 4] == packet[12:at + 4] and len(answer) <= 512
        ends = [end for *_, end in lt.walk_records(answer, at + 4, sum(counts[1:]))]
        assert (ends or [at + 4])[-1] == len(answer)


@given(damaged(packets) | packets | packets.map(lambda asked: zone.answer(asked)), numbers)
def records_of_others(packet, kind):
    """What a resolver says is read, or is not an answer; who may issue is known of all that is."""
    try:
        records = lt.read_records(packet, kind)
    except (IndexError, ValueError, lt.struct.error):
        return

    async def says(*_):
        return records
    with unittest.mock.patch.object(lt, 'ask_dns', says):
        loop.run_until_complete(lt.caa_terms(None, 't.example', ['t.example', '*.t.example']))


quiet = settings(max_examples=EXAMPLES, deadline=None, database=None,
                 suppress_health_check=list(HealthCheck))
@given(damaged(mails) | st.binary(max_size=99))
def mail_becomes_a_form(data):
    """Whatever a message is, all of it is in the form, and the form has its end."""
    with lt.compose('BOUNDARY', 'a@b', 'c@d', io.BytesIO(data)) as form:
        form.seek(0)
        assert form.read().endswith(data + b'\r\n--BOUNDARY--\r\n')


class AtOnce:
    """A disk for which nobody waits."""

    async def do(self, work, *what):
        work(*what)


def message_in(fed):
    """The message in the pieces FED, and what is left behind it; or why there is none."""
    raw, letter, postman = io.BytesIO(), lt.Letter('', False), object.__new__(lt.Postman)
    postman._connection = stream = lt.ByteStream(runtime)
    postman._server = types.SimpleNamespace(runtime=runtime)
    postman._office = types.SimpleNamespace(room=lt.Budget(1 << 20), disk=AtOnce(), senders={})
    postman._trace = lambda letter: b''
    try:
        assert run_with(postman._read(letter, raw), stream, fed) == ''
    except (lt.Reply, lt.Disconnected) as e:
        return str(e)
    return raw.getvalue(), stream.peek()


@given(damaged(mails), cuts, st.sampled_from([b'', b'NOOP\r\n']))
def message_ends(data, sizes, rest):
    """However cut: the same message, which ends with CR LF . CR LF and with nothing else."""
    data += b'\r\n.\r\n' + rest
    found, end = message_in([data]), (b'\r\n' + data).find(b'\r\n.\r\n')
    cut = message_in(pieces(data, sizes))
    if isinstance(found, str):
        assert cut == found
    else:
        assert cut[0] == found[0] and found[1] == data[end + 3:]
        assert found[0] == b''.join(line[line[:1] == b'.':] for line in data[:end].splitlines(True))


PROPERTIES = [quiet(check) for check in (
    frame_decoder, request_head, response_head, parsers_alone, chunks_arrive, chunk_reader,
    zone_answers, records_of_others, mail_becomes_a_form, message_ends)]


# Memory.

def decoder_eats():
    """A consumer: frames are dropped as they come."""
    decoder = lt.Decoder()
    while True:
        decoder.feed((yield))


def chunks_eat():
    """A consumer: the body is dropped as it comes."""
    stream = lt.ByteStream(runtime)
    body = lt.ChunkedBody(stream)
    while True:
        stream.feed_data((yield))
        while body.take():
            pass


def head_eats():
    """A consumer: a head that never ends."""
    stream = lt.ByteStream(runtime)
    reading = lt.read_head(stream, 60)
    while True:
        stream.feed_data((yield))
        try:
            reading.send(None)
        except StopIteration as whole:
            lt.parse_request(whole.value)
            raise AssertionError('it was a head, after all') from None


# What is fed, to whom, what comes first, and what comes again and again.
ENDLESS = [
    ('frames', decoder_eats, b'', lt.encode_frame(lt.DATA, 1, bytes(5000))),
    ('pings', decoder_eats, b'', lt.encode_frame(lt.PING, 0, bytes(8)) * 100),
    ('a long frame', decoder_eats, b'\x02\xff\xff\xff', b'\0'),
    ('chunks of one byte', chunks_eat, b'', b'1\r\nx\r\n' * 200),
    ('a chunk of 1 TB', chunks_eat, b'10000000000\r\n', bytes(5000)),
    ('a chunk size', chunks_eat, b'', b'0' * 100),
    ('a chunk extension', chunks_eat, b'1;', b'x' * 100),
    ('a chunk without its end', chunks_eat, b'1\r\nx', b'\r'),
    ('a trailer', chunks_eat, b'0\r\na:', b'x' * 100),
    ('trailers one by one', chunks_eat, b'0\r\n', b'a: b\r\n'),
    ('trailers at once', chunks_eat, b'0\r\n', b'a:\r\n' * 10000),
    ('a request line', head_eats, b'GET /', b'x' * 100),
    ('header lines', head_eats, b'GET / HTTP/1.1\r\n', b'a: b\r\n'),
    ('a header line', head_eats, b'GET / HTTP/1.1\r\na:', b'x' * 100),
    ('empty lines before a request', head_eats, b'', b'\r\n' * 100)]


def stays_flat(name, consumer, first, data):
    """Feed FIRST, then DATA without an end or until it is refused, and watch the memory."""
    gc.collect()
    tracemalloc.reset_peak()
    before, fed, end = tracemalloc.get_traced_memory()[0], 0, 'taken'
    feeding = consumer()
    next(feeding)
    try:
        feeding.send(first)
        while fed < ENDLESS_PIECES and fed * len(data) < ENDLESS_BYTES:
            feeding.send(data)
            fed += 1
    except (lt.ProtocolError, lt.BadHttp) as e:
        end = f'refused: {e}'
    grown = tracemalloc.get_traced_memory()[1] - before
    print(f'  {name}: {fed * len(data):,} bytes {end}; {grown >> 10} KiB held at most', flush=True)
    assert grown < FLAT, f'{name}: {grown} bytes held'


def kept():
    """Bytes that localtunnel.py has allocated and not given back."""
    gc.collect()
    mine = tracemalloc.Filter(True, lt.__file__)
    found = tracemalloc.take_snapshot().filter_traces([mine])
    return sum(trace.size for trace in found.traces)


def main(seconds=60.0, first=None):
    """Run everything; returns nothing, and raises what failed."""
    first = first if first is not None else int(time.time())
    print(f'fuzzing for {seconds:.0f} s from seed {first}')
    tracemalloc.start()
    for case in ENDLESS:
        stays_flat(*case)
    deadline, number, before = time.monotonic() + seconds, 0, kept()
    while not number or time.monotonic() < deadline:
        for check in PROPERTIES:
            seed(first + number)(check)()
        number += 1
        assert kept() - before < KEPT, f'{kept() - before} bytes stay after {number} rounds'
    print(f'{number} rounds of {len(PROPERTIES)} properties, {EXAMPLES} examples each, '
          f'{kept() - before} bytes kept')


if __name__ == '__main__':
    main(*[kind(word) for kind, word in zip((float, int), sys.argv[1:])])
    runtime._timer.cancel()
    loop.close()
