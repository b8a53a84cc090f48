#!/usr/bin/env python3
"""The tests of localtunnel.py, and its benchmark.

    python3 test_localtunnel.py [NAME ...]      the tests, all or those named as with unittest
    python3 test_localtunnel.py bench           speed beside a direct connection, in about a minute

The rooms are those of localtunnel.py, in the same order.  Sockets are real and of the loopback;
nobody sleeps until something is ready, and every test ends with no task, stream or socket left.
"""

import ast
import asyncio
import builtins
import contextlib
import functools
import hashlib
import http.client
import http.server
import importlib.util
import inspect
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
import unittest.mock

import localtunnel as lt

SCRIPT = os.path.abspath(lt.__file__)
PATIENCE = 30.0     # seconds: what has not happened by then never will; nothing is timed by this
KEY = bytes(range(32))
POSIX = os.name == 'posix'


async def eventually(true, what='it never became true'):
    """Let the loop turn until TRUE() is; only where nothing tells."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(what)
        await asyncio.sleep(0.001)


def in_a_loop(method):
    """Make a test of a coroutine."""
    @functools.wraps(method)
    def test(self):
        asyncio.run(self.alone(method))
    return test


class LoopTest(unittest.TestCase):
    """Its coroutines are tests: each has a loop and a reactor, and leaves nothing there."""

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        for name in dir(cls):
            method = getattr(cls, name)
            if name.startswith('test') and inspect.iscoroutinefunction(method):
                setattr(cls, name, in_a_loop(method))

    async def alone(self, method):
        self.loop, self.faults = asyncio.get_running_loop(), []
        self.loop.set_exception_handler(lambda _, context: self.faults.append(context))
        self.reactor = lt.Reactor(self.loop)
        async with contextlib.AsyncExitStack() as self.stack:
            await asyncio.wait_for(method(self), PATIENCE)
        await self.nothing_is_left()

    async def nothing_is_left(self):
        def left():
            return [x for x in self.reactor.swept if isinstance(x, (lt.Connection, lt.Session))]
        await eventually(lambda: not left(), 'a connection or session is left')
        await self.reactor.close()
        me = {asyncio.current_task()}
        await eventually(lambda: asyncio.all_tasks() == me, 'a task is left')
        self.assertEqual(self.faults, [])

    def sockets(self, small=None):
        """Two TCP sockets that are connected; SMALL clogs them after so many bytes."""
        with socket.socket() as listener, contextlib.ExitStack() as undo:
            left = undo.enter_context(socket.socket())
            for sock in (listener, left) if small else ():
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, small)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, small)
            listener.bind(('127.0.0.1', 0))
            listener.listen(1)
            left.connect(listener.getsockname())
            undo.pop_all()
            return left, listener.accept()[0]

    async def connection(self, sock):
        """A Connection on SOCK, closed at the end."""
        _, made = await self.loop.create_connection(lambda: lt.Connection(self.reactor), sock=sock)
        self.stack.callback(lambda: made.error or made.transport.abort())
        return made

    async def connections(self, small=None):
        return [await self.connection(sock) for sock in self.sockets(small)]

    async def raw(self, sock):
        """(reader, writer) of asyncio on SOCK, closed at the end."""
        reader, writer = await asyncio.open_connection(sock=sock)
        self.stack.callback(writer.transport.abort)
        return reader, writer

    @contextlib.asynccontextmanager
    async def background(self, coroutine):
        """COROUTINE runs meanwhile, and is ended."""
        task = asyncio.ensure_future(coroutine)
        try:
            yield task
        finally:
            await self.forget(task)

    async def forget(self, task):
        """End TASK, whatever became of it."""
        task.cancel()
        await asyncio.wait({task})
        task.cancelled() or task.exception()

    def constant(self, **values):
        """Other values for constants of localtunnel.py, in a `with`."""
        return unittest.mock.patch.multiple(lt, **values)


def three_ways(data):
    """How DATA may arrive: whole, byte by byte, and with bytes behind it that do not belong to it."""
    whole = [data]
    return ((whole, b''), ([data[i:i + 1] for i in range(len(data))], b''), (whole, b'GET / HTTP'))


def missing(test, what):
    """Skip TEST for want of WHAT, which the machine of CI must have."""
    if os.environ.get('CI') == 'true':
        test.fail(f'{what} is missing')
    test.skipTest(f'{what} is missing')


def pattern(n, seed=0):
    """N bytes that don't repeat, and the same ones for the same SEED."""
    return random.Random(seed).getrandbits(8 * n).to_bytes(n, 'big') if n else b''


# ------------------------------------------------------------------------------------------------
# 1. Constants and errors
# ------------------------------------------------------------------------------------------------

class ErrorTest(unittest.TestCase):

    def test_all_errors_are_of_one_family(self):
        kinds = [v for v in vars(lt).values() if isinstance(v, type) and issubclass(v, Exception)
                 and v.__module__ == lt.__name__]
        self.assertTrue(all(issubclass(kind, lt.LocaltunnelError) for kind in kinds))

    def test_a_ping_has_its_answer_before_the_server_calls_the_session_dead(self):
        self.assertLess(lt.PING_AFTER + lt.PONG_WITHIN, lt.SILENT_SESSION)

    def test_a_frame_fits_into_the_first_credit_and_a_head_into_what_is_read(self):
        self.assertLessEqual(lt.MAX_PAYLOAD, lt.INITIAL_CREDIT)
        self.assertLessEqual(lt.MAX_HEAD, lt.UNREAD_HIGH)


# ------------------------------------------------------------------------------------------------
# 2. Wire
# ------------------------------------------------------------------------------------------------

CODEC = (       # frame, and its bytes
    ((lt.OPEN, 1, b'GET'), '01000003 00000001 474554'),
    ((lt.OPEN | lt.END, 2, b'x'), '81000001 00000002 78'),
    ((lt.OPEN, 3, b''), '01000000 00000003'),
    ((lt.DATA, 0xffffffff, b'\0'), '02000001 ffffffff 00'),
    ((lt.DATA | lt.END, 1, b''), '82000000 00000001'),
    ((lt.RESET, 7, b'\0\1gone'), '03000006 00000007 0001 676f6e65'),
    ((lt.CREDIT, 7, b'\0\1\0\0'), '04000004 00000007 00010000'),
    ((lt.CREDIT, 0, b'\0\0\x40\0'), '04000004 00000000 00004000'),
    ((lt.PING, 0, bytes(8)), '05000008 00000000 0000000000000000'),
    ((lt.PONG, 0, b'\0' * 7 + b'\5'), '06000008 00000000 0000000000000005'),
    ((lt.GOAWAY, 0, b'\0\1'), '07000002 00000000 0001'),
)

BROKEN = (      # bytes that are no frame, and a word of the complaint
    ('00000000 00000001', 'unknown'), ('08000000 00000001', 'unknown'),
    ('7f000000 00000000', 'unknown'), ('80000000 00000001', 'unknown'),
    ('83000002 00000001 0000', 'END'), ('84000004 00000001 00000001', 'END'),
    ('85000008 00000000 0000000000000000', 'END'), ('87000002 00000000 0000', 'END'),
    ('02000000 00000001', 'DATA'), ('02010001 00000001', 'bytes'), ('01ffffff 00000001', 'bytes'),
    ('04000003 00000001 000000', 'CREDIT'), ('04000005 00000001 0000000000', 'CREDIT'),
    ('05000000 00000000', 'PING'), ('06000009 00000000 000000000000000000', 'PONG'),
    ('03000001 00000001 00', 'code'), ('07000000 00000000', 'code'),
    ('02000001 00000000 00', 'stream 0'), ('01000000 00000000', 'stream 0'),
    ('03000002 00000000 0000', 'stream 0'), ('05000008 00000001 0000000000000000', 'stream 1'),
    ('07000002 00000009 0000', 'stream 9'),
)


class WireTest(unittest.TestCase):

    def test_each_frame_has_these_bytes(self):
        for frame, hexed in CODEC:
            with self.subTest(frame):
                self.assertEqual(lt.encode_frame(*frame), bytes.fromhex(hexed))

    def test_frames_are_found_however_their_bytes_arrive(self):
        for frame, hexed in CODEC:
            for pieces, rest in three_ways(bytes.fromhex(hexed)):
                with self.subTest(frame, pieces=len(pieces), rest=rest):
                    decoder = lt.Decoder()
                    frames = [f for piece in pieces for f in decoder.feed(piece)]
                    self.assertEqual(frames + decoder.feed(rest[:7]), [frame])

    def test_all_frames_of_one_read_are_found(self):
        data = b''.join(bytes.fromhex(hexed) for _, hexed in CODEC)
        for n in range(1, len(data)):
            decoder = lt.Decoder()
            frames = decoder.feed(data[:n]) + decoder.feed(memoryview(data)[n:])
            self.assertEqual(frames, [frame for frame, _ in CODEC])

    def test_the_longest_frame_passes_and_one_byte_more_does_not(self):
        data = lt.encode_frame(lt.DATA, 1, bytes(lt.MAX_PAYLOAD))
        self.assertEqual(len(lt.Decoder().feed(data)[0][2]), lt.MAX_PAYLOAD)
        with self.assertRaises(lt.ProtocolError):
            lt.Decoder().feed(lt.encode_frame(lt.DATA, 1, bytes(lt.MAX_PAYLOAD + 1)))

    def test_what_is_no_frame_is_a_protocol_error(self):
        for hexed, word in BROKEN:
            for pieces, rest in three_ways(bytes.fromhex(hexed)):
                with self.subTest(hexed, pieces=len(pieces)):
                    decoder = lt.Decoder()
                    with self.assertRaisesRegex(lt.ProtocolError, word):
                        for piece in [*pieces, rest]:
                            decoder.feed(piece)

    def test_a_payload_is_not_a_view_of_the_read_buffer(self):
        buffer = bytearray(bytes.fromhex('02000001 00000001 61'))
        frames = lt.Decoder().feed(memoryview(buffer))
        buffer[:] = bytes(len(buffer))
        self.assertEqual(frames, [(lt.DATA, 1, b'a')])

    def test_random_bytes_give_frames_or_a_protocol_error(self):
        chance = random.Random(1)
        for _ in range(3000):
            data = bytearray(chance.getrandbits(8) for _ in range(chance.randrange(40)))
            if data and chance.random() < .9:
                data[0] = chance.choice([1, 2, 3, 4, 5, 6, 7, 0x81, 0x82])
                data[1:3] = bytes(len(data[1:3]))
            with contextlib.suppress(lt.ProtocolError):
                decoder = lt.Decoder()
                for i in range(0, len(data), 7):
                    decoder.feed(data[i:i + 7])

    def test_however_bytes_are_cut_the_same_frames_come_out(self):
        chance = random.Random(2)
        for _ in range(300):
            data = b''.join(lt.encode_frame(*chance.choice(CODEC)[0]) for _ in range(5))
            decoder, frames = lt.Decoder(), []
            while data:
                n = chance.randint(1, 20)
                frames += decoder.feed(data[:n])
                data = data[n:]
            self.assertEqual(len(frames), 5)

    def test_a_reason_survives_the_wire(self):
        self.assertEqual(lt.decode_reason(lt.encode_reason(lt.OVERDUE, 'too late')), (5, 'too late'))
        self.assertEqual(lt.decode_reason(b'\1\0'), (256, ''))

    def test_a_reason_is_short_and_safe_for_a_terminal(self):
        self.assertLessEqual(len(lt.encode_reason(0, '\u20ac' * 1000)), 502)
        code, text = lt.decode_reason(lt.encode_reason(0, '\u20ac' * 1000))
        self.assertTrue(text.startswith('\u20ac' * 100))
        self.assertEqual(lt.decode_reason(b'\0\0a\x1b[2J\r\n\xff')[1], 'a?[2J??\ufffd')

    def test_what_is_printed_has_no_control_characters(self):
        self.assertEqual(lt.printable('a\x1b\n\x7f\u202eb\u00e9'), 'a????b\u00e9')


# ------------------------------------------------------------------------------------------------
# 3. Credit
# ------------------------------------------------------------------------------------------------

class BudgetTest(unittest.TestCase):

    def test_what_is_taken_is_taken_from_the_parent_too(self):
        process = lt.Budget(100)
        session = lt.Budget(80, process)
        self.assertTrue(session.take(60))
        self.assertEqual((session.used, process.used), (60, 60))
        session.give(60)
        self.assertEqual((session.used, process.used), (0, 0))

    def test_nothing_is_taken_where_either_has_too_little(self):
        process = lt.Budget(100)
        small, large = lt.Budget(10, process), lt.Budget(1000, process)
        self.assertFalse(small.take(11))
        self.assertFalse(large.take(101))
        self.assertEqual((small.used, large.used, process.used), (0, 0, 0))
        self.assertTrue(large.take(100))

    def test_it_is_scarce_once_half_is_promised_here_or_above(self):
        process = lt.Budget(100)
        one, other = lt.Budget(1000, process), lt.Budget(1000, process)
        self.assertFalse(one.take(49) and other.scarce)
        self.assertTrue(one.take(1) and other.scarce)


class WindowTest(unittest.TestCase):

    def window(self, size=100, budget=10000):
        self.budget = lt.Budget(budget)
        self.assertTrue(self.budget.take(size))
        return lt.ReceiveWindow(size, self.budget)

    def drain(self, window, now, round_trip=1.0):
        """A whole window arrives and is read by NOW; what is promised anew."""
        n = window.size
        window.arrived(n)
        return sum(window.consumed(part, now, round_trip) for part in (n - n // 2, n // 2))

    def test_credit_comes_back_half_a_window_at_a_time(self):
        window = self.window()
        window.arrived(100)
        self.assertEqual([window.consumed(n, 5, .1) for n in (49, 1, 20, 29)], [0, 50, 0, 0])
        self.assertEqual(window.consumed(1, 9, .1), 50)

    def test_exactly_what_was_promised_may_arrive(self):
        window = self.window()
        window.arrived(100)
        with self.assertRaisesRegex(lt.ProtocolError, 'credit'):
            window.arrived(1)

    def test_credit_given_back_may_arrive_again(self):
        window = self.window()
        window.arrived(100)
        window.arrived(window.consumed(60, 9, .1))
        with self.assertRaises(lt.ProtocolError):
            window.arrived(1)

    def test_it_doubles_when_a_full_one_was_drained_within_two_round_trips(self):
        window = self.window()
        self.assertEqual(self.drain(window, 2.0), 200)
        self.assertEqual((window.size, self.budget.used), (200, 200))
        window.arrived(200)

    def test_it_stays_when_that_took_longer(self):
        window = self.window()
        self.assertEqual(self.drain(window, 2.1), 100)
        self.assertEqual((window.size, self.budget.used), (100, 100))

    def test_it_halves_when_a_full_one_took_longer_than_sixteen(self):
        window = self.window()
        self.drain(window, 1.0)
        self.assertEqual(self.drain(window, 20.0), 100)
        self.assertEqual((window.size, self.budget.used), (100, 100))
        window.arrived(100)
        with self.assertRaises(lt.ProtocolError):
            window.arrived(1)

    def test_it_never_shrinks_below_where_it_began(self):
        window = self.window()
        self.assertEqual(self.drain(window, 1e6), 100)
        self.assertEqual(window.size, 100)

    def test_it_grows_no_further_than_the_budget_and_never_stops(self):
        window = self.window(budget=300)
        self.assertEqual([self.drain(window, 0.0) for _ in range(3)], [200, 200, 200])
        self.assertEqual(self.budget.used, 200)

    def test_it_grows_no_further_than_the_largest_window(self):
        window = self.window(lt.MAX_WINDOW // 2 + 1, lt.GIB)
        self.drain(window, 0.0)
        self.assertEqual(window.size, lt.MAX_WINDOW // 2 + 1)

    def test_the_budget_comes_back_when_it_closes(self):
        window = self.window()
        self.drain(window, 0.0)
        window.close()
        self.assertEqual(self.budget.used, 0)

    def test_promised_and_unread_and_read_always_add_up_to_its_size(self):
        chance = random.Random(3)
        for _ in range(100):
            window, may, unread, now = self.window(), 100, 0, 0.0
            for _ in range(200):
                n = chance.randint(0, may)
                window.arrived(n)
                may, unread, now = may - n, unread + n, now + chance.choice([0, 1, 40])
                n = chance.randint(0, unread)
                unread -= n
                may += window.consumed(n, now, chance.choice([.1, 1, 10]))
                self.assertEqual(window._promised, may)
                self.assertEqual(window._promised + unread + window._read, window.size)
                self.assertTrue(may or unread, 'the sender may never send again')
            window.close()
            self.assertEqual(self.budget.used, 0)


# ------------------------------------------------------------------------------------------------
# 4. Byte streams
# ------------------------------------------------------------------------------------------------

class SignalTest(LoopTest):

    async def wait(self, signal, log):
        try:
            await signal
            log.append('woke')
        except BaseException as e:
            log.append(type(e).__name__)
            raise

    async def waiting(self):
        """(a signal, the task that waits there, what became of it)"""
        signal, log = lt.Signal(self.loop), []
        task = asyncio.ensure_future(self.wait(signal, log))
        await eventually(lambda: signal._resume is not None)
        return signal, task, log

    async def from_callback(self, function):
        """Call FUNCTION where no task runs; what it gave."""
        done = self.loop.create_future()
        self.loop.call_soon(lambda: done.set_result(function()))
        return await done

    async def test_from_a_callback_the_waiting_task_runs_at_once(self):
        signal, task, log = await self.waiting()
        self.assertEqual(await self.from_callback(lambda: signal.set() or list(log)), ['woke'])
        await task

    async def test_from_another_task_it_runs_in_the_next_turn(self):
        signal, task, log = await self.waiting()
        signal.set()
        self.assertEqual(log, [])
        await task
        self.assertEqual(log, ['woke'])

    async def test_setting_it_where_nobody_waits_is_not_remembered(self):
        signal = lt.Signal(self.loop)
        signal.set()
        task = asyncio.ensure_future(self.wait(signal, []))
        await eventually(lambda: signal._resume is not None)
        self.assertFalse(task.done())
        signal.set()
        await task

    async def test_the_same_signal_serves_again_and_again(self):
        signal, log = lt.Signal(self.loop), []

        async def body():
            for _ in range(3):
                await self.wait(signal, log)
        task = asyncio.ensure_future(body())
        while not task.done():
            signal.set()
            await asyncio.sleep(0)
        self.assertEqual(log, ['woke'] * 3)

    async def test_a_wait_can_be_cancelled(self):
        signal, task, log = await self.waiting()
        task.cancel()
        with self.assertRaises(asyncio.CancelledError):
            await task
        self.assertEqual(log, ['CancelledError'])

    async def test_cancelling_wins_over_what_comes_in_the_same_turn(self):
        for after in (lambda signal: signal.set(), lambda signal: signal.sweep(5)):
            signal, task, log = await self.waiting()
            signal.deadline = 5
            await self.from_callback(lambda: (task.cancel(), after(signal)))
            await asyncio.wait({task})
            self.assertEqual(log, ['CancelledError'])

    async def test_after_a_cancelled_wait_it_still_serves(self):
        signal, task, _ = await self.waiting()
        task.cancel()
        await asyncio.wait({task})
        task = asyncio.ensure_future(self.wait(signal, []))
        await eventually(lambda: signal._resume is not None)
        signal.set()
        await task

    async def test_the_sweep_ends_a_wait_whose_deadline_has_passed(self):
        signal, task, log = await self.waiting()
        signal.deadline = 10
        await self.from_callback(lambda: signal.sweep(9.9))
        self.assertEqual(log, [])
        await self.from_callback(lambda: signal.sweep(10))
        with self.assertRaises(lt.Overdue):
            await task

    async def test_a_deadline_is_for_one_wait_only(self):
        signal, task, _ = await self.waiting()
        signal.deadline = 10
        signal.set()
        await task
        self.assertEqual(signal.deadline, lt.NEVER)

    async def test_wait_for_understands_it(self):
        with self.assertRaises(asyncio.TimeoutError):
            await asyncio.wait_for(self.wait(lt.Signal(self.loop), []), 0)


class ReactorTest(LoopTest):

    async def test_a_task_that_fails_is_reported(self):
        async def fail():
            raise ValueError('on purpose')
        task = self.reactor.spawn(fail())
        await asyncio.wait({task})
        await eventually(lambda: self.faults)
        self.assertIn('on purpose', str(self.faults.pop()['exception']))

    async def test_closing_ends_its_tasks(self):
        task = self.reactor.spawn(asyncio.sleep(1e6))
        await self.reactor.close()
        self.assertTrue(task.cancelled())

    async def test_members_are_swept_again_and_again(self):
        swept = asyncio.Queue()
        member = unittest.mock.Mock(sweep=lambda now, woke_up: swept.put_nowait(woke_up))
        with self.constant(SWEEP=0.001):
            self.reactor.swept.add(member)
            self.assertFalse(await swept.get() or await swept.get())

    async def test_a_machine_that_slept_is_noticed(self):
        swept = asyncio.Queue()
        member = unittest.mock.Mock(sweep=lambda now, woke_up: swept.put_nowait(woke_up))
        with self.constant(SWEEP=0.001):
            self.reactor.swept.add(member)
            await swept.get()
            loop_time, wall = self.reactor._mark
            self.reactor._mark = loop_time, wall - 3600
            while not await swept.get():
                pass


class OneWay:
    """What every stream promises to one who writes and one who reads, as trio checks its own."""

    async def pair(self):
        """(the side that writes, the side that reads)"""
        raise NotImplementedError

    async def clog(self, writer):
        """Write until there is no room; the task that waits, and what it has written and will."""
        piece, written = pattern(100000), []

        async def fill():
            while True:
                written.append(piece)
                await writer.write(piece)
        task = asyncio.ensure_future(fill())
        self.stack.push_async_callback(self.forget, task)
        await eventually(lambda: writer._writable._resume is not None)
        return task, written

    async def until_the_end(self, reader):
        pieces = []
        while True:
            pieces.append(await reader.read())
            if not pieces[-1]:
                return b''.join(pieces)

    async def test_bytes_arrive_in_order(self):
        writer, reader = await self.pair()
        await writer.write(b'one')
        self.assertEqual(await reader.read(), b'one')
        await writer.write(memoryview(b'two'))
        await writer.write(b'three', end=True)
        self.assertEqual(await self.until_the_end(reader), b'twothree')

    async def test_a_read_waits_for_the_first_byte(self):
        writer, reader = await self.pair()
        async with self.background(reader.read()) as reading:
            await eventually(lambda: reader._readable._resume is not None)
            await writer.write(b'x')
            self.assertEqual(await reading, b'x')

    async def test_a_read_takes_no_more_than_its_limit(self):
        writer, reader = await self.pair()
        await writer.write(b'abcdef')
        self.assertEqual([await reader.read(n) for n in (1, 2)], [b'a', b'bc'])
        self.assertEqual((reader.peek(), reader.size), (b'def', 3))
        self.assertEqual((reader.take(2), reader.take(9), reader.take(9)), (b'de', b'f', b''))

    async def test_the_end_is_seen_again_and_again(self):
        writer, reader = await self.pair()
        await writer.write(b'x')
        await writer.write_eof()
        self.assertEqual([await reader.read() for _ in range(3)], [b'x', b'', b''])
        self.assertTrue(reader.ended)
        self.assertFalse(await reader.more())

    async def test_an_end_without_bytes_arrives(self):
        writer, reader = await self.pair()
        await writer.write_eof()
        self.assertEqual(await reader.read(), b'')

    async def test_many_bytes_of_all_sizes_arrive_unharmed(self):
        writer, reader = await self.pair()
        data, chance = pattern(2 * lt.MIB), random.Random(4)

        async def send():
            at = 0
            while at < len(data):
                n = chance.choice([1, 100, 65536, 65537, 300000])
                await writer.write(data[at:at + n])
                at += n
            await writer.write_eof()
        async with self.background(send()):
            self.assertEqual(await self.until_the_end(reader), data)

    async def test_a_clogged_stream_goes_on_when_somebody_reads(self):
        writer, reader = await self.pair()
        task, written = await self.clog(writer)
        before, got = len(written), b''
        while len(written) < before + 3:
            got += await reader.read()
        await lt.end_task(task)
        self.assertTrue(b''.join(written).startswith(got))

    async def test_a_clogged_writer_learns_of_the_readers_reset(self):
        writer, reader = await self.pair()
        task, _ = await self.clog(writer)
        reader.reset(lt.CANCELLED, 'no more')
        with self.assertRaises(lt.LocaltunnelError):
            await task

    async def test_a_clogged_writer_can_be_reset_from_beside_it(self):
        writer, _ = await self.pair()
        task, _ = await self.clog(writer)
        writer.reset(lt.CANCELLED, 'no more')
        with self.assertRaises(lt.LocaltunnelError):
            await task

    async def test_a_clogged_writer_can_be_cancelled(self):
        writer, _ = await self.pair()
        task, _ = await self.clog(writer)
        task.cancel()
        with self.assertRaises(asyncio.CancelledError):
            await task

    async def test_a_writer_that_is_clogged_for_too_long_is_overdue(self):
        writer, _ = await self.pair()
        writer.idle = 0.0
        with self.constant(SWEEP=0.001):
            task, _ = await self.clog(writer)
            with self.assertRaises(lt.Overdue):
                await task

    async def test_a_reader_learns_of_a_reset_and_never_takes_it_for_the_end(self):
        writer, reader = await self.pair()
        async with self.background(self.until_the_end(reader)) as reading:
            await writer.write(b'x')
            writer.reset(lt.FAILED, 'broken')
            with self.assertRaises(lt.LocaltunnelError):
                await reading

    async def test_after_its_own_reset_neither_side_of_it_goes_on(self):
        writer, _ = await self.pair()
        writer.reset(lt.CANCELLED, 'no more')
        await eventually(lambda: writer.error)
        for work in (writer.write(b'x'), writer.read()):
            with self.assertRaises(lt.LocaltunnelError):
                await work

    async def test_a_reset_may_come_twice(self):
        writer, reader = await self.pair()
        for stream in (writer, writer, reader, reader):
            stream.reset(lt.CANCELLED, 'no more')

    async def test_a_read_that_is_cancelled_loses_nothing(self):
        writer, reader = await self.pair()
        async with self.background(reader.read()):
            await eventually(lambda: reader._readable._resume is not None)
        await writer.write(b'x')
        self.assertEqual(await reader.read(), b'x')

    async def test_a_read_may_have_a_deadline(self):
        writer, reader = await self.pair()
        with self.constant(SWEEP=0.001), self.assertRaises(lt.Overdue):
            await reader.more(0.0)
        await writer.write(b'x')
        self.assertEqual(await reader.read(), b'x')

    async def test_each_direction_ends_by_itself(self):
        left, right = await self.pair()
        await left.write(b'question', end=True)
        self.assertEqual(await self.until_the_end(right), b'question')
        await right.write(b'answer')
        self.assertEqual(await left.read(), b'answer')
        await right.write_eof()
        self.assertEqual(await left.read(), b'')

    async def test_both_directions_carry_at_the_same_time(self):
        left, right = await self.pair()
        data = [pattern(lt.MIB, seed) for seed in (1, 2)]
        async with self.background(left.write(data[0], end=True)):
            async with self.background(right.write(data[1], end=True)):
                ends = await asyncio.gather(self.until_the_end(right), self.until_the_end(left))
        self.assertEqual(ends, data)


class ConnectionTest(OneWay, LoopTest):

    async def pair(self):
        return await self.connections(small=20000)

    async def test_it_knows_its_peer(self):
        left, _ = await self.connections()
        self.assertEqual((left.peer, repr(left)), ('127.0.0.1', '<Connection 127.0.0.1>'))

    async def test_closing_lets_what_was_written_leave(self):
        left, right = await self.pair()
        left.transport.write(pattern(lt.MIB))
        left.close()
        left.close()
        self.assertEqual(await self.until_the_end(right), pattern(lt.MIB))
        await eventually(lambda: left.error)
        left.reset(lt.CANCELLED, 'it is closed already')

    async def test_closing_is_forced_where_the_other_side_never_reads(self):
        left, _ = await self.pair()
        with self.constant(SWEEP=0.001, CLOSE_TIMEOUT=0.0):
            left.transport.write(bytes(lt.MIB))
            left.close()
            await eventually(lambda: left.error)

    async def test_what_nobody_reads_stays_in_the_kernel(self):
        left, right = await self.pair()
        await self.clog(left)
        self.assertLessEqual(right.size, lt.UNREAD_HIGH + lt.READ_SIZE)

    async def test_a_reset_is_no_clean_end_for_any_program(self):
        left, right = self.sockets()
        mine = await self.connection(left)
        reader, _ = await self.raw(right)
        mine.reset(lt.CANCELLED, 'no more')
        with self.assertRaises(ConnectionResetError):
            await reader.read()

    async def test_an_answer_arrives_though_the_other_side_still_sends(self):
        left, right = await self.connections()
        async with self.background(right.write(bytes(4 * lt.MIB))):
            await left.write(b'stop')
            ends = await asyncio.gather(self.until_the_end(right), left.linger())
        self.assertEqual(ends[0], b'stop')

    async def test_lingering_has_an_end_though_the_other_side_never_stops(self):
        left, right = await self.connections()
        async with self.background(right.write(bytes(40 * lt.MIB))):
            await left.linger()
        self.assertTrue(left.transport.is_closing())

    async def test_a_reset_that_arrives_while_nobody_reads_is_noticed(self):
        left, right = self.sockets()
        mine, (_, writer) = await self.connection(left), await self.raw(right)
        with self.constant(SWEEP=0.001):
            writer.write(bytes(2 * lt.MIB))
            await eventually(lambda: mine._paused)
            right.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            writer.transport.abort()
            await eventually(lambda: mine.error)

    async def test_whoever_asked_for_it_hears_of_its_end(self):
        left, right = await self.connections()
        heard = asyncio.Queue()
        left.on_eof, left.on_gone = (lambda: heard.put_nowait('eof')), (lambda: heard.put_nowait('gone'))
        await right.write_eof()
        self.assertEqual(await heard.get(), 'eof')
        left.reset(lt.CANCELLED, '')
        self.assertEqual(await heard.get(), 'gone')


@unittest.skipUnless(hasattr(socket, 'AF_UNIX'), 'this system has no Unix sockets')
class UnixConnectionTest(OneWay, LoopTest):

    async def pair(self):
        return [await self.connection(sock) for sock in socket.socketpair()]

    async def test_a_reader_learns_of_a_reset_and_never_takes_it_for_the_end(self):
        """A Unix socket has no reset: its reader sees an end."""

    async def test_a_clogged_stream_goes_on_when_somebody_reads(self):
        writer, reader = await self.pair()
        self.assertEqual((writer.peer, repr(reader)), ('', '<Connection >'))
        await super().test_a_clogged_stream_goes_on_when_somebody_reads()


class LineTest(unittest.TestCase):

    def stream(self, *pieces):
        made = lt.ByteStream(types.SimpleNamespace(loop=None, now=float))
        for piece in pieces:
            made.feed(piece)
        return made

    def test_a_line_is_found_however_it_arrived(self):
        for pieces in ([b'ab\ncd'], [b'a', b'b\ncd'], [b'ab', b'\n', b'cd'], [b'a', b'b', b'\nc', b'd']):
            stream = self.stream(*pieces)
            self.assertEqual((stream.take_line(9), stream.take_line(9)), (b'ab\n', None))
            self.assertEqual((stream.peek(), stream.size), (b'cd', 2))

    def test_a_line_may_have_as_many_bytes_as_its_limit_and_no_more(self):
        self.assertEqual(self.stream(b'ab\n').take_line(3), b'ab\n')
        self.assertIsNone(self.stream(b'ab').take_line(3))
        for pieces in ([b'abc\n'], [b'a', b'bc\n'], [b'abc']):
            with self.assertRaises(lt.BadHttp):
                self.stream(*pieces).take_line(3)


class JoinTest(LoopTest):

    async def joined(self):
        """Two ends of a conversation that passes through a join, and the join."""
        (left, inner_left), (inner_right, right) = await self.connections(), await self.connections()
        task = asyncio.ensure_future(lt.join(inner_left, inner_right))
        self.stack.push_async_callback(lt.end_task, task)
        return left, right, task

    async def test_bytes_and_ends_pass_both_ways(self):
        left, right, task = await self.joined()
        await left.write(b'there', end=True)
        self.assertEqual([await right.read(), await right.read()], [b'there', b''])
        await right.write(b'back', end=True)
        self.assertEqual([await left.read(), await left.read()], [b'back', b''])
        await task

    async def test_a_reset_of_one_side_is_a_reset_of_the_other(self):
        left, right, task = await self.joined()
        left.reset(lt.CANCELLED, 'no more')
        with self.assertRaises(lt.LocaltunnelError):
            await right.read()
        await task

    async def test_a_reset_after_a_half_close_still_passes(self):
        left, right, task = await self.joined()
        await left.write_eof()
        self.assertEqual(await right.read(), b'')
        right.reset(lt.CANCELLED, 'no more')
        with self.assertRaises(lt.LocaltunnelError):
            await left.read()
        await task

    async def test_when_one_of_both_fails_the_other_is_ended(self):
        ended = []

        async def forever():
            try:
                await asyncio.sleep(1e6)
            finally:
                ended.append(True)

        async def fail():
            raise lt.Incomplete('on purpose')
        with self.assertRaises(lt.Incomplete):
            await lt.both(forever(), fail())
        self.assertEqual(ended, [True])
