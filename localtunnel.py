#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = []
# ///
"""localtunnel: puts a local program on the internet under a friendly URL.

    python3 localtunnel.py client 8000                      gives http://localhost:8000 a URL
    python3 localtunnel.py server --domain t.example.com    runs the server, for your own clients

One file, the standard library only, CPython 3.8 and later.  Read it from top to bottom, once, and
you know how tunnelling works: in part I each room uses only the rooms above it, and is handed the
rest, which stands at the beginning of part II.

A visitor's request goes out through a session that the client opened from inside:

    visitor --> server ===== session =====> client --> app         the request
    visitor <-- server <==== session ====== client <-- app         the response

    request    visitor -> Server.serve -> Server.forward -> open_stream -> Exchange.send => session
               session => App.serve -> App._forward -> connect -> Exchange.send -> app
    response   app -> read_final -> App._respond -> Exchange.respond => session
               session => read_final -> Exchange.respond -> visitor
    upgrade    after the heads, and raw TCP from the start: join(left, right)

The objects on the way; an Exchange is the same at both ends:

    Visitor --> Exchange --> Stream === Session === Stream --> Exchange --> App

Words
    server    the public end.  client: the program beside the app.
    app       the local program that a tunnel leads to.  upstream: a connection to it.
    visitor   anyone who opens the public URL.
    tunnel    one name (or port) on a server, and the client that serves it.
    session   the conversation between client and server that carries a tunnel, over one connection;
              with the room Resume it outlives that, and goes on over another.
    stream    one conversation inside a session.  exchange: one request and its response.
    lease     the right of one owner to one name.
    hello     what a client says as it asks for a session.  welcome: what the server says to that.
    key       a user's: the secret from which names come.  A tunnel's: its name, or tcp:NAME.
    site      the host by which a user names the server.
    relay     the server, in what programs read.
    credit    how many bytes one side may still send on a stream.

Rooms
    I. The tunnel             II. Around it             III. The command line
     1 Constants and errors   14 Seams                  59 Output
     2 Wire                   15 Places                 60 Keys
     3 Credit                 16 Doors                  61 Terminal
     4 Byte streams           17 Header lines           62 Options
     5 Session                18 Own pages              63 Wiring
     6 HTTP/1.1               19 Plain words            64 Python
     7 Names                  20 Files                  65 Configuration file
     8 Exchange               21 Annex                  66 Command line
     9 Tunnels                22 TLS
    10 Admission              23 Tokens and leases
    11 Server                 24 Limits
    12 App                    25 DNS
    13 Client                 26 Windows
                              27 Resume
                              28 Kept leases
                              29 Access
                              30 Cluster
                              31 Held requests
                              32 Shared site
                              33 Crowds
                              34 Raw TCP
                              35 Folder and echo
                              36 Host header
                              37 Outgoing proxy
                              38 Certificates
                              39 Certificates by ACME
                              40 Hand-over
                              41 Operator's page
                              42 Block list
                              43 Kept requests
                              44 Mail
                              45 Ground
                              46 Doctor
                              47 Landing page
                              48 Verifying
                              49 Token files
                              50 Invitations
                              51 Exchanges
                              52 Inspector's page
                              53 Inspector
                              54 Logs and replay
                              55 Words from elsewhere
                              56 Error pages
                              57 Setting up
                              58 Via ssh
"""

from __future__ import annotations

import argparse
import asyncio
import asyncio.sslproto
import atexit
import base64
import bisect
import codecs
import collections
import concurrent.futures
import contextlib
import copy
import datetime
import errno
import fnmatch
import functools
import gc
import glob
import hashlib
import hmac
import html
import http
import io
import ipaddress
import itertools
import json
import logging
import operator
import os
import random
import re
import secrets
import select
import shutil
import signal
import socket
import ssl
import stat
import struct
import sys
import textwrap
import threading
import time
import types
import urllib.parse
import warnings
import weakref
import zlib
from typing import (IO, Any, AsyncIterator, Awaitable, BinaryIO, Callable, Container, Coroutine,
                    Dict, Generator, Iterable, Iterator, List, Mapping, NamedTuple, NoReturn,
                    Optional, Sequence, TextIO, Tuple, TypeVar, Union)

__version__ = '1.0'

# What other programs use, see the room Python; the rest may change from one version to the next.
__all__ = 'tunnel', 'LocaltunnelError', 'UsageError', 'Refused', '__version__'

# The address that a server writes here when it hands this file out; empty in the original.
STAMPED_SERVER = ''


# ================================================================================================
# I. THE TUNNEL
#
# All that a tunnel takes.  Where more can be added there is a seam: an attribute that does little
# or nothing until it is filled; its comment says with what.  Larger parts are handed in, and stand
# at the beginning of part II:
#
#   Observer, ClientObserver    are told what happens at a server, at a client   (room Seams)
#   Target, Upstreams           where the app is, and the connections to it   (Places)
#   ServerAddress, Backoff      where the server is, and when it is tried again   (Places)
#   Doors                       what a server listens on
#   Onward                      header lines of requests and responses, as a server passes them on
#   Own, Pages                  a response of our own, and those of a server
#   Words                       what a client tells its user and visitors where something failed
#   Front                       who stands in front of a server, and what it says of visitors
#   Tls                         how a server speaks TLS, and who must
#   Grant, Tokens, Leases       what a token allows, and who owns a chosen name
#   Limits, OnlyOne             what one client may have; a server with a place for one tunnel
# ================================================================================================

# ------------------------------------------------------------------------------------------------
# 1. Constants and errors
#
# Every wait has a deadline (in seconds) and every buffer a bound (in bytes), each with its reason.
# Those that users may meet are here, as README lists them; the others stand above their only use.
# An error carries what the other side is told; lower errors are put into words for people once.
# ------------------------------------------------------------------------------------------------

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
NEVER = float('inf')

# The session between client and server.
INITIAL_CREDIT = 64 * KIB       # of a stream, each way: most responses need no CREDIT at all
SMALL_CREDIT = 16 * KIB         # the same once half of what the session may have is promised
LEAST_CREDIT = 4 * KIB          # the same once three quarters are: it may never be used
SESSION_BUDGET = 72 * MIB       # of one session: its windows, and what it keeps, see Resume
LEAST_BUDGET = 64 * MIB         # what a process has for all sessions, at least
MAX_STREAMS = 1024              # of a session: hundreds of WebSockets behind one tunnel are normal
MAX_DRAINING = 4                # of a client's sessions: a server may say goodbye over and over
MAX_TEXT = 500                  # characters, or bytes, that the other side can make us show
PING_AFTER = 8.0                # of silence, on the client: NAT tables forget after 30
PONG_WITHIN = 6.0               # or the connection is given up
ROUND_TRIP = 0.1                # to the other side and back, until it is measured
ANSWER_WITHIN = 2.0             # for a PONG, where another client of the owner wants the place
SILENT_SESSION = 20.0           # of silence, on the server: longer than the two together

# Messages.
OUTER_HEAD = 63 * KIB           # a head from a visitor or an app: nginx takes 32 KiB, Node 16
OUTER_FIELDS = 200              # header fields of a visitor or an app: Apache takes 100
MAX_HEAD = 64 * KIB             # a message head inside a tunnel
MAX_FIELDS = 216                # inside a tunnel there are Via, X-Forwarded-* and Date as well
UNREAD_HIGH = 128 * KIB         # unread on one socket before reading pauses, where a reader waits
READ_AHEAD = 64 * KIB           # the same where nobody waits: a stalled connection holds no more
RESPONSE_HEAD = UNREAD_HIGH     # of a response inside a tunnel: debug bars send 100 kB
RESPONSE_FIELDS = 516           # and some apps set hundreds of cookies
MAX_LINE = 16 * KIB             # a request line: RFC 9112 asks for at least 8,000
MAX_CHUNK_LINE = 4 * KIB        # a chunk's size with its extensions, which nobody uses
MAX_INTERIM = 1000              # 1xx before the final response: some send 102 every few seconds
SMALL_BODY = 16 * KIB           # sent in one frame with its head, and kept to be sent again
DISCARDED = 1 * MIB             # read of an app that closed, so that its last words arrive

# Visitors, and the app.
HEAD_TIMEOUT = 30.0             # for a whole request head: slow-header attacks end here
KEEP_ALIVE = 75.0               # between requests on a visitor's connection, as in nginx
BODY_IDLE = 3600.0              # without a byte of a body in either direction
UPLOAD_IDLE = 60.0              # the same of a request without a response; at first HEAD_TIMEOUT
HALF_CLOSED = 2.0               # without a byte of a response after the visitor's FIN: it is gone
LINGER = 2.0                    # for a response to arrive before its connection is closed
LINGER_MOST = 30.0              # the same while a visitor still sends a body, as in nginx
RESPONSE_TIMEOUT = 3600.0       # for the app to begin its response: some take long to compute

# Tunnels and their names.
MAX_AWAY = 10000                # names remembered after their last client left
REMEMBERED = 600.0              # and for how long: until then one is offline, not unknown

# While a client or a server is away, or ends.
HELD = 8.0                      # a request waits for its client (--hold): GitHub gives up at 10
RETRY_AFTER = 5                 # what visitors of a tunnel that is offline are told
DRAIN = 30.0                    # for open exchanges to finish when one side stops (--drain)

# The clock.
SWEEP = 0.5                     # between checks of the deadlines: they may be late by this much


class LocaltunnelError(Exception):
    """An error whose text is a sentence for the user or for the other side."""

    def again(self) -> LocaltunnelError:
        """Return a copy to raise, where this one is kept.

        A raised exception holds its traceback, and so every frame and buffer on the way; keeping
        it in an attribute would make a cycle that only the collector frees.
        """
        error = self.__class__.__new__(self.__class__, *self.args)
        error.__dict__.update(self.__dict__)
        return error


def plainly(error: BaseException) -> str:
    """Return what ERROR says, without the number that Python gives it."""
    return getattr(error, 'strerror', None) or str(error)


def printable(text: str) -> str:
    """Return TEXT made safe for a terminal and a log: one line, no control characters."""
    return text if text.isprintable() else ''.join(c if c.isprintable() else '?' for c in text)


class UsageError(LocaltunnelError):
    """What the user typed can't be done; exit code 2."""


class ProtocolError(LocaltunnelError):
    """The other end of a session broke the protocol; GOAWAY tells it so."""


class Disconnected(LocaltunnelError):
    """The connection ended before the work on it was done."""


class Overdue(Disconnected):
    """A deadline passed."""


class Incomplete(Disconnected):
    """The stream ended inside a message."""


class StreamReset(LocaltunnelError):
    """A stream is over; `code` is one of the RESET codes, the text says why."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class BadHttp(LocaltunnelError):
    """A message that is malformed or ambiguous; `status` is what its sender is told."""
    head = b''                      # that of a response, if this was read
    early = False                   # True: found in a body, before anything of its message went on

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class HopFailed(LocaltunnelError):
    """A request can't be answered because one hop fails or forbids it.

    `status` is what the visitor is told, with the header lines `extra`.  `hop` is how far the
    request came: "relay" (the server), "client" or "app"; `cure` is what helps, for the owner.
    """

    def __init__(self, status: int, text: str, *extra: str, hop: str = 'relay',
                 cure: str = '') -> None:
        super().__init__(text)
        self.status, self.extra, self.hop, self.cure = status, extra, hop, cure


class Refused(LocaltunnelError):
    """The server will not open this tunnel: an HTTP status, a word for programs, a sentence.

    A `final` one also ends a client that had been welcome before.
    """

    def __init__(self, status: int, code: str, text: str, final: bool = False) -> None:
        super().__init__(text)
        self.status, self.code, self.final = status, code, final


# ------------------------------------------------------------------------------------------------
# 2. Wire
#
# Frame codec: bytes in, frames out.  Knows no sockets, no clocks, no asyncio.
#
#   0        1                    4                        8
#   +--------+--------------------+------------------------+---------------------
#   | E kind | length of payload  | stream                 | payload
#   +--------+--------------------+------------------------+---------------------
#
# E (0x80) says END: no more from this side on this stream (half close).
# ------------------------------------------------------------------------------------------------

PROTOCOL = 'localtunnel/1'
WELL_KNOWN = '/.well-known/localtunnel'      # where a session is asked for

# kind            payload                             who sends it, and when
OPEN = 1        # opening bytes: an HTTP head,        the server, for a new stream: ids 1, 2, 3, ...
#                 or a TCP visitor's address
DATA = 2        # bytes                               both; takes credit
RESET = 3       # u16 code, text                      both: the stream is over both ways
CREDIT = 4      # u32                                 both: this many more bytes may be sent;
#                                                     on stream 0: what later ones begin with
PING = 5        # u64: frame bytes received so far    both: are you there?
PONG = 6        # the same                            both, at once, in reply to a PING
GOAWAY = 7      # u16 code, text                      both: make a new session, this one ends
END = 0x80

KIND_NAMES = {OPEN: 'OPEN', DATA: 'DATA', RESET: 'RESET', CREDIT: 'CREDIT',
              PING: 'PING', PONG: 'PONG', GOAWAY: 'GOAWAY'}

# Codes of RESET.
DONE = 0            # nothing more is wanted of the stream
CANCELLED = 1       # one side of the conversation has gone
INCOMPLETE = 2      # the rest of the request is malformed, or late
SESSION_LOST = 3    # not sent: what this side says to itself when the session is over
OVERLOADED = 4      # there is no room for one more
FAILED = 6          # the client could not serve it
# Codes of GOAWAY.
DRAINING = 0        # this side stops: a client may come to the next server
SUPERSEDED = 1      # another client of the owner was started later
REVOKED = 2         # the client may not come back
PROTOCOL_BROKEN = 3

FRAME_HEADER = struct.Struct('>II')
U32, U64, REASON_CODE = struct.Struct('>I'), struct.Struct('>Q'), struct.Struct('>H')
FIXED_LENGTHS = {CREDIT: 4, PING: 8, PONG: 8}
Frame = Tuple[int, int, bytes]      # kind with END, stream, payload
Buffer = Union[bytes, memoryview]

MAX_PAYLOAD = 64 * KIB          # of a frame, a stream's turn to write: 50 ms at 10 Mbit/s


def encode_frame(kind: int, stream: int, payload: Buffer = b'') -> bytes:
    """Return one frame; KIND may carry END, PAYLOAD has at most MAX_PAYLOAD bytes."""
    return FRAME_HEADER.pack(kind << 24 | len(payload), stream) + payload


def encode_reason(code: int, text: str) -> bytes:
    """Return the payload of RESET and GOAWAY."""
    return REASON_CODE.pack(code) + text.encode()[:MAX_TEXT]


def decode_reason(payload: bytes) -> tuple[int, str]:
    """Return (code, text) of RESET and GOAWAY; what is not printable becomes '?'."""
    text = payload[2:MAX_TEXT + 2].decode(errors='replace')
    return REASON_CODE.unpack_from(payload)[0], printable(text)


CARRYING = frozenset((OPEN, DATA, OPEN | END, DATA | END))      # bytes, on a stream
FRAMES_TOGETHER = 128           # of one session in one turn of the loop; then it is others' turn


class Decoder:
    """Turns the bytes of a session into frames.

    Checks whatever one frame alone can show; the session judges what it means on its stream.
    """
    __slots__ = ('received', 'behind', '_rest', '_lacks')

    def __init__(self) -> None:
        self.received = 0           # bytes, in all
        self.behind = False         # there may be whole frames left: feed(b'') gives them
        self._rest = b''            # what is here of the next frame, and of others behind it
        self._lacks = 0             # bytes that are missing of that frame, where this is known

    def feed(self, data: Buffer) -> list[Frame]:
        """Return the frames that DATA completes, at most FRAMES_TOGETHER.

        Raises ProtocolError, after which it must not be fed.
        """
        frames: list[Frame] = []
        n, self._lacks = self._lacks, 0
        if 0 < n < len(data):       # joined to all of DATA, it would cost a copy of that
            frames, data = self.feed(data[:n]), data[n:]
        self.received += len(data)
        if self._rest:
            data = self._rest + bytes(data)
        at, end = 0, len(data)
        while at + 8 <= end and len(frames) < FRAMES_TOGETHER:
            word, stream = FRAME_HEADER.unpack_from(data, at)
            length = word & 0xffffff
            if length > MAX_PAYLOAD:
                raise ProtocolError(f'a frame of {length} bytes')
            begin = at + 8
            if begin + length > end:
                self._lacks = begin + length - end
                break
            at = begin + length
            kind, payload = word >> 24, bytes(data[begin:at])
            if kind not in CARRYING or not length or not stream:
                self._check(kind, stream, payload)
            frames.append((kind, stream, payload))
        self._rest = bytes(data[at:]) if at < end else b''
        self.behind = len(frames) == FRAMES_TOGETHER
        return frames

    @staticmethod
    def _check(flagged: int, stream: int, payload: bytes) -> None:
        kind = flagged & ~END
        if kind not in KIND_NAMES:
            raise ProtocolError(f'a frame of unknown kind {kind}')
        if flagged & END and kind not in (OPEN, DATA):
            raise ProtocolError(f'END on {KIND_NAMES[kind]}')
        if flagged == DATA and not payload:
            raise ProtocolError('DATA without bytes and without END')
        if len(payload) != FIXED_LENGTHS.get(kind, len(payload)):
            raise ProtocolError(f'{KIND_NAMES[kind]} of {len(payload)} bytes')
        if kind in (RESET, GOAWAY) and len(payload) < 2:
            raise ProtocolError(f'{KIND_NAMES[kind]} without a code')
        if (stream == 0) != (kind in (PING, PONG, GOAWAY)) and (kind, stream) != (CREDIT, 0):
            raise ProtocolError(f'{KIND_NAMES[kind]} on stream {stream}')


# ------------------------------------------------------------------------------------------------
# 3. Credit
#
# How much may be under way on a stream.  Knows no sockets, no clocks; callers bring the time.
#
# The receiver promises a window, and the sender never has more than that under way.  What has been
# read is promised again (CREDIT), a quarter of the window at a time.  Here a window stays as it is:
# most responses fit into it, and a large one comes as fast as the path is short; see Windows.
# ------------------------------------------------------------------------------------------------

SESSION_FLOOR = 256 * KIB       # which a session may have, however little the process has


class Budget:
    """Bytes that may be promised; what is taken here is taken from the parent too, if it has one.

    There are two levels: a session and its process.  A session leaves as much of its process as it
    has: one that is greedy gets half, two get a third each, and others always find room.
    """
    __slots__ = ('limit', 'used', '_parent')

    def __init__(self, limit: int, parent: Budget | None = None) -> None:
        self.limit, self.used, self._parent = limit, 0, parent

    def take(self, n: int, leave: int = 0) -> bool:
        """Take N bytes and return True if LEAVE more stay for others; else take nothing."""
        parent, least = self._parent, n + leave
        used = self.used + least
        if used > self.limit:
            return False
        if parent:
            if used > SESSION_FLOOR and used + parent.used + least > parent.limit:
                return False
            parent.used += n
        self.used += n
        return True

    def give(self, n: int) -> None:
        """Give back N bytes that were taken."""
        self.used -= n
        if self._parent:
            self._parent.used -= n


class ReceiveWindow:
    """How much this side lets the other send on one stream, from the first CREDIT on.

    Invariant: what is promised (may still arrive) + unread + `read` (not promised again) = `size`.
    """
    __slots__ = ('size', 'read', 'budget')

    def __init__(self, size: int, budget: Budget) -> None:
        self.size = size
        self.read = 0               # bytes that were read, and not promised again
        self.budget = budget        # what it is taken from

    def consumed(self, n: int, now: float, round_trip: float) -> int:
        """Note that N bytes were read; return how many to promise anew (0: not yet).

        NOW and ROUND_TRIP are for a window that fits itself to the path, see Windows.
        """
        self.read += n
        if self.read * 4 < self.size:
            return 0
        credit, self.read = self.read, 0
        return credit

    def widen(self, size: int) -> int:
        """Grow until a head of SIZE bytes fits, and return how many bytes to promise.

        Up to MAX_HEAD it grows even where the budget has nothing left.
        """
        n = max(0, size - self.size)
        if not self.budget.take(n):
            n = max(0, MAX_HEAD - self.size)
            self.budget.give(-n)    # taken all the same
        self.size += n
        return n


# ------------------------------------------------------------------------------------------------
# 4. Byte streams
#
# One shape of stream, `read, write, write_eof, reset`, which sockets and tunnel streams share, so
# that later rooms copy from any to any.  Knows no frames and no HTTP.
#
# asyncio's own StreamReader and StreamWriter have this shape, and where a name here is theirs it
# means the same.  They are not used because a tunnel stream is not a socket, which StreamWriter
# wants, and because each wait on them costs a Future and a turn of the loop: with the rooms below
# on them the tunnel carried a quarter fewer requests a second; by their private parts, a tenth
# fewer for one visitor and 12% more instructions.  `await write(data)` is their write() and
# drain() in one: it returns when there is room for more, and there is no other backpressure.
#
# What arrives runs the task that waits for it at once, up to its next await, inside the call that
# brought it (Waiter.wake; and feed_data, set_exception, wake_writer, which end in it).  So such a
# call is the last thing that a method does, and a loop that makes it looks again at all that may
# have changed.  And a loop whose next input may be here already, by an outsider's choice, has to
# give the others their turn: `await asyncio.sleep(0)`.
#
# The ways to end.  What has arrived can still be read after all of them but linger.
#
#   call           a socket's peer sees      a stream's peer sees       what is unsent
#   write_eof()    FIN; with TLS the end     END                        leaves first
#   reset()        RST                       RESET with its reason      is lost
#   abort()        RST                                                  is lost
#   close()        FIN                       RESET, if it still runs    leaves first
#   linger()       FIN; for some seconds what it sends is dropped       leaves first
# ------------------------------------------------------------------------------------------------

class Waiter:
    """Where one task waits until something happens; used again and again.

    A Future-like object (asyncio.isfuture), made for two reasons: `wake` runs the waiting task
    inside the callback that brings the news, where a Future takes one more turn of the loop with
    its system call; and a wait needs no new object.  A wait may end early, so waiters loop.  The
    task runs on in the context of its waker: there are no context variables here.
    """
    __slots__ = ('_asyncio_future_blocking', '_loop', 'waiting', '_error', 'deadline')

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._asyncio_future_blocking = False
        self._loop = loop
        self.waiting: Callable[[Waiter], object] | None = None      # wakes the task that waits
        self._error: BaseException | None = None
        self.deadline = NEVER       # when a sweep ends the wait with Overdue

    def __await__(self) -> Generator[Waiter, None, None]:
        self._asyncio_future_blocking = True
        yield self

    def wake(self) -> None:
        """Wake the task that waits here, if one does."""
        resume = self.waiting
        if resume is None:
            return
        if asyncio.current_task(self._loop) is not None:
            self._loop.call_soon(self.wake)      # one task can't run inside another
            return
        self.waiting, self.deadline = None, NEVER
        resume(self)
        del resume      # a traceback may keep this frame, and the frame the task

    def sweep(self, now: float) -> None:
        """End the wait if its deadline has passed."""
        if now >= self.deadline and self.waiting is not None and self._error is None:
            self._error = Overdue('nothing happened in time')
            self.wake()

    # The rest is for asyncio: Task calls it.

    def add_done_callback(self, callback: Callable[[Waiter], object], *,
                          context: Any = None) -> None:
        self.waiting = callback

    def result(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error       # or it would hold itself; see LocaltunnelError.again

    def cancel(self, msg: Any = None) -> bool:
        self._error = asyncio.CancelledError()
        self._loop.call_soon(self.wake)
        return True


READ_SIZE = 256 * KIB           # per read of a socket; larger ones gain nothing
WOKE_UP = 5.0                   # the wall clock is this far ahead: the machine has slept
IDLE_TASKS = 256                # kept for the next stream or connection


class Runtime:
    """What the byte streams of one event loop share: a read buffer, the deadlines, the tasks."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.now = time.monotonic       # what loop.time calls
        self.buffer = memoryview(bytearray(READ_SIZE))      # all sockets are read into it
        self.nobody = Waiter(loop)      # where nobody ever waits
        self.swept: set[Any] = set()            # objects with sweep(now, woke_up)
        self.transports: set[asyncio.Transport] = set()     # of the connections that are not over
        self.numbers = itertools.count(1)       # of the exchanges of all apps
        self._tasks: set[asyncio.Task[Any]] = set()         # those that run
        self._idle: list[tuple[Waiter, list[Any]]] = []     # and wait for what to do next
        self.lag = 0.0              # of the event loop at the last sweep, in seconds
        self._mark = (loop.time(), time.time())     # the last sweep, by both clocks
        self._timer = loop.call_later(SWEEP, self._sweep)

    def _sweep(self) -> None:
        now, wall = self.now(), time.time()
        woke_up = wall - self._mark[1] - (now - self._mark[0]) > WOKE_UP
        self.lag = max(0.0, now - self._mark[0] - SWEEP)
        self._mark = now, wall
        self._timer = self.loop.call_later(SWEEP, self._sweep)      # first: the rest may fail
        for member in tuple(self.swept):
            member.sweep(now, woke_up)

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a task and hold it until it ends."""
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def begin(self, work: Callable[[Any], Coroutine[Any, Any, None]], item: Any) -> None:
        """Let a task WORK on ITEM, which handles its own exceptions.

        An idle one begins at once, where a new one would in the next turn of the loop.
        """
        if self._idle:
            waiter, box = self._idle.pop()
            box += item, work
            waiter.wake()
        else:
            self.spawn(self._work([item, work]))

    async def _work(self, box: list[Any]) -> None:
        waiter = Waiter(self.loop)
        while box:
            await box.pop()(box.pop())      # no name here, or it would hold them while it is idle
            if len(self._idle) < IDLE_TASKS:
                self._idle.append((waiter, box))
                while not box:
                    await waiter

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.loop.call_exception_handler(
                {'message': 'a task failed', 'exception': task.exception(), 'task': task})

    async def close(self) -> None:
        """End all tasks and the sweep."""
        self._timer.cancel()
        tasks = self._tasks - {asyncio.current_task()}
        while tasks:
            self._idle.clear()      # they end, too
            for task in tasks:
                task.cancel()       # see end_task
            _, tasks = await asyncio.wait(tasks, timeout=SWEEP)
        while self.transports:
            for transport in tuple(self.transports):
                transport.abort()
            await asyncio.sleep(0)      # asyncio closes them in the next turn


Facts = Dict[str, Any]          # what a log tells beside its sentence, by the names for programs
UNSERVED: Facts = {'name': '', 'user': '', 'client': '', 'version': ''}     # where no client is

SMALL_PIECE = 16 * KIB          # smaller unread pieces, on average, are joined
MANY_PIECES = 16                # unread on a stream: beyond this, small ones are joined


class ByteStream:
    """The reading half that all streams share, and the shape of the writing half.

    Only one task reads and only one writes.
    """
    facts = UNSERVED                # of a tunnel's stream, at a server: whose it is
    __slots__ = ('runtime', 'unread', 'eof', 'error', 'timeout', '_piece', '_at', '_more',
                 '_readable', '_writable', '_paused')

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._paused = False        # too much is unread: nothing arrives for now
        self.unread = 0             # bytes that arrived and were not read
        self.eof = False            # nothing more arrives
        self.error: LocaltunnelError | None = None          # why the stream is broken, for good
        self.timeout = BODY_IDLE    # seconds that a wait may last
        self._piece = b''           # the first of what is unread
        self._at = 0                # bytes of it that have been read
        self._more: collections.deque[bytes] | None = None      # pieces behind it, if any came
        self._readable = self._writable = runtime.nobody        # made when a task waits there

    # For the side that brings the bytes.

    def feed_data(self, data: bytes) -> None:
        """Take in DATA that arrived."""
        if not self.unread:
            self._piece = data
        else:
            if self._more is None:
                self._more = collections.deque()
            elif len(self._more) > MANY_PIECES and self.unread < len(self._more) * SMALL_PIECE:
                self.peek()     # a piece of one byte takes 40, and as long to write as a large one
            self._more.append(data)
        self.unread += len(data)
        self._readable.wake()

    def feed_eof(self) -> None:
        """Note that nothing more will arrive."""
        self.eof = True
        self._readable.wake()

    def set_exception(self, error: LocaltunnelError) -> None:
        """Break the stream with ERROR; what had arrived can still be read."""
        if self.error is None:
            self.error = error
        self._readable.wake()
        self.wake_writer()

    def check(self) -> None:
        """Raise what broke the stream, if anything did; hot paths test `error` first."""
        if self.error is not None:
            raise self.error.again()

    # For the side that reads.

    @types.coroutine
    def wait_for_data(self, timeout: float | None = None) -> Generator[Waiter, None, bool]:
        """Wait until more is unread than now; return False when nothing more will come.

        Raises what broke the stream, or Overdue.
        """
        size, began = self.unread, self.runtime.now()
        while self.unread == size:
            if self.eof:
                return False
            if self.error is not None:
                self.check()
            if self._paused:
                self.wanted()
            if self._readable is self.runtime.nobody:
                self._readable = Waiter(self.runtime.loop)
            waiter = self._readable     # what follows is `await waiter`, with one object less
            waiter.deadline = began + (self.timeout if timeout is None else timeout)
            waiter._asyncio_future_blocking = True
            yield waiter
        return True

    async def until_broken(self) -> None:
        """Wait until the stream is broken; what arrives stays unread."""
        while self.error is None:
            if self._readable is self.runtime.nobody:
                self._readable = Waiter(self.runtime.loop)
            self._readable.deadline = NEVER
            await self._readable

    def allow(self, seconds: float) -> None:
        """Let waits last SECONDS from now on, one that is under way as well."""
        self.timeout = seconds
        self._readable.wake()

    def read_nowait(self, limit: float) -> bytes:
        """Return bytes that are here, at most LIMIT; b'' if there are none."""
        if not self.unread:
            return b''
        piece, at = self._piece, self._at
        left = len(piece) - at
        if left <= limit:
            if at:
                piece = piece[at:]
                self._at = 0
            self._piece = self._more.popleft() if self._more else b''
        else:
            left = int(limit)
            self._at = end = at + left
            piece = piece[at:end]
        self.unread -= left
        if not self.eof:
            self.consumed(left)
        return piece

    async def read(self, limit: int = READ_SIZE) -> bytes:
        """Return the next bytes, at most LIMIT; b'' at the end."""
        if not self.unread and not await self.wait_for_data():
            return b''
        return self.read_nowait(limit)

    def peek(self) -> bytes:
        """Return all unread bytes and leave them unread."""
        if self._at:
            self._piece, self._at = self._piece[self._at:], 0
        if self._more:
            self._piece += b''.join(self._more)
            self._more.clear()
        return self._piece

    def readline_nowait(self, limit: int) -> bytes | None:
        """The next line with its LF; None where no LF is among the first LIMIT bytes unread."""
        if not self.unread:
            return None
        end = self._piece.find(b'\n', self._at, self._at + limit)
        if end < 0:
            end = self.peek().find(b'\n', 0, limit)
        if end >= 0:
            return self.read_nowait(end + 1 - self._at)
        return None

    def wanted(self) -> None:
        """A reader waits for more, though what arrives is paused."""

    def consumed(self, n: int) -> None:
        """Note that N bytes were read, which makes room for others: more may arrive."""

    def widen(self, size: int) -> None:
        """A message head of SIZE bytes must fit in what may arrive unread."""

    # For the side that writes.

    def wake_writer(self) -> None:
        """Let a writer that waits look again."""
        self._writable.wake()

    async def _wait_for_room(self) -> None:
        if self._writable is self.runtime.nobody:
            self._writable = Waiter(self.runtime.loop)
        self._writable.deadline = self.runtime.now() + self.timeout
        await self._writable

    def end_waits(self, now: float) -> None:
        """End the waits whose deadline has passed."""
        self._readable.sweep(now)
        self._writable.sweep(now)

    async def write(self, data: Buffer, end: bool = False) -> None:
        """Send DATA, with END as the last; return once there is room for more."""
        raise NotImplementedError

    async def write_eof(self) -> None:
        """Half close: send nothing more; reading goes on."""
        raise NotImplementedError

    def reset(self, code: int, text: str) -> None:
        """End both directions at once, so that the other side can tell it from a clean end."""
        raise NotImplementedError


def has_closed(sock: socket.socket) -> bool:
    """True if the peer has ended its half of SOCK, behind what is unread; only Linux tells."""
    if not hasattr(select, 'POLLRDHUP'):
        return False
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLRDHUP)
    return bool(poll.poll(0))


Serve = Callable[['Connection'], Coroutine[Any, Any, None]]     # what a connection is given to

UNSENT_LOW = 128 * KIB          # unsent in the kernel: a reader that stalls holds no more than this
CLOSE_TIMEOUT = 20.0            # for the last bytes to leave before a close is forced


class Connection(ByteStream, asyncio.BufferedProtocol):
    """One socket, with or without TLS."""
    __slots__ = ('transport', 'serve', 'receiver', 'on_lost', 'on_eof', 'on_room', 'writing_paused',
                 'secure', 'silent', '_close_by', '_pending', '__weakref__')

    def __init__(self, runtime: Runtime, serve: Serve | None = None) -> None:
        """SERVE runs as a task from the moment of connection."""
        super().__init__(runtime)
        self.transport: asyncio.Transport = None        # type: ignore[assignment]  # soon made
        self.serve = serve          # what a task does with it, if any does
        # Set by a session, or by who waits for the connection's end; None again afterwards.
        self.receiver: Callable[[memoryview], None] | None = None       # takes all bytes instead
        self.on_lost: Callable[[], None] | None = None          # the connection is over
        self.on_eof: Callable[[], None] | None = None           # the other side sends no more
        self.on_room: Callable[[], None] | None = None          # there is room to write again
        self.writing_paused = False         # more is written than the kernel takes
        self.secure = False         # it has TLS
        self.silent = True          # no byte has arrived yet, or none since it was taken again
        self._close_by = NEVER      # when a close is forced; NEVER before close()
        self._pending = sys.maxsize     # bytes unsent when the close was last overdue

    def __repr__(self) -> str:
        return f'<Connection {self.peer}>'

    @property
    def peer(self) -> str:
        """The other side's address; '' for a Unix socket."""
        name = self.transport.get_extra_info('peername') if self.transport else None
        return str(name[0]) if isinstance(name, tuple) and name else ''

    # asyncio's transport calls these.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport      # type: ignore[assignment]
        self.secure = transport.get_extra_info('ssl_object') is not None
        if self.secure:
            self.transport.set_write_buffer_limits(UNSENT_LOW)      # asyncio's are 512 KiB
        sock = transport.get_extra_info('socket')
        if sock is not None:
            with contextlib.suppress(OSError):      # of a Unix socket, or reset: macOS says so here
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if hasattr(socket, 'TCP_NOTSENT_LOWAT'):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_LOW)
        self.runtime.swept.add(self)
        self.runtime.transports.add(self.transport)
        if self.serve:
            self.runtime.begin(self.serve, self)

    def get_buffer(self, sizehint: int) -> memoryview:
        # With TLS all that has come has to fit: asyncio reads once more where the connection ends.
        if self.receiver is None and not (self.secure or self._paused) and (
                self._readable.waiting is None):
            return self.runtime.buffer[:max(1, READ_AHEAD + 1 - self.unread)]
        return self.runtime.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.silent = False
        if self.receiver is not None:
            self.receiver(self.runtime.buffer[:nbytes])
            return
        self.feed_data(bytes(self.runtime.buffer[:nbytes]))
        if self.unread > READ_AHEAD and not self._paused and not self.transport.is_closing() and (
                self.unread > UNREAD_HIGH or self._readable.waiting is None):
            self._paused = True
            self.transport.pause_reading()

    def eof_received(self) -> bool:
        self.feed_eof()
        if self.on_eof:
            self.on_eof()
        return not self.secure      # asyncio's TLS has no half close: there it is the end

    def connection_lost(self, exc: BaseException | None) -> None:
        if exc is not None:
            exc.with_traceback(None)    # of a failed write: it holds its writer, and so itself
        self.runtime.swept.discard(self)
        self.runtime.transports.discard(self.transport)
        self.writing_paused = False
        if exc is not None and not self.secure and self.receiver is None:
            self._read_last_words()
        self.set_exception(Disconnected(
            f'the connection broke: {plainly(exc)}' if exc else 'the connection ended'))
        on_lost, self.on_lost, self.on_eof = self.on_lost, None, None
        if on_lost:
            on_lost()

    def _read_last_words(self) -> None:
        """Read what the other side said before a write failed: the kernel may still hold it."""
        sock = self.transport.get_extra_info('socket')
        with contextlib.suppress(OSError):      # nothing more to read
            while os.name == 'posix' and self.unread <= DISCARDED:
                data = os.read(sock.fileno(), READ_SIZE)
                if not data:
                    break
                self.feed_data(data)

    def pause_writing(self) -> None:
        self.writing_paused = True

    def resume_writing(self) -> None:
        self.writing_paused = False
        self.runtime.loop.call_soon(self.wake_writer)      # asyncio's write must end first
        if self.on_room:
            self.runtime.loop.call_soon(self.on_room)

    def sweep(self, now: float, woke_up: bool) -> None:
        """Check the deadlines; the runtime calls this now and then."""
        self.end_waits(now)
        if now >= self._close_by:
            pending = self.transport.get_write_buffer_size()
            if 0 < pending < self._pending:
                self._close_by = now + CLOSE_TIMEOUT        # slow, but it reads
            else:
                self.transport.abort()
            self._pending = pending
        elif self._paused:      # a transport that does not read sees no reset
            sock = self.transport.get_extra_info('socket')
            if sock is not None and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self.transport.abort()
            elif sock is not None and self.on_eof and has_closed(sock):
                on_eof, self.on_eof = self.on_eof, None     # nor does it see an end behind bytes
                on_eof()

    # ByteStream's side.

    def consumed(self, n: int) -> None:
        if self._paused and self.unread <= READ_AHEAD // 2:
            self.wanted()

    def wanted(self) -> None:
        if self._paused and self.unread <= UNREAD_HIGH:
            self._paused = False
            if not self.transport.is_closing():
                self.transport.resume_reading()

    async def write(self, data: Buffer, end: bool = False) -> None:
        if self.error is not None:
            self.check()
        self.transport.write(data)
        while self.writing_paused:
            await self._wait_for_room()
            self.check()
        if end:
            await self.write_eof()

    async def write_eof(self) -> None:
        """Half close; over TLS, which can't, close the connection."""
        self.check()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.close()

    def reset(self, code: int, text: str) -> None:
        if self.transport not in self.runtime.transports:
            return      # already over
        sock = self.transport.get_extra_info('socket')
        if sock is not None and sock.family != getattr(socket, 'AF_UNIX', None):
            with contextlib.suppress(OSError):      # already closed
                # Zero seconds of linger: what goes out is RST, not FIN.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        self.transport.abort()

    def abort(self) -> None:
        """End it at once, so that the other side can tell it from a clean end."""
        self.reset(CANCELLED, '')

    def close(self) -> None:
        """Close once everything written has left; by force after CLOSE_TIMEOUT."""
        if not self.transport.is_closing():
            self._close_by = self.runtime.now() + CLOSE_TIMEOUT
            self.transport.close()

    async def linger(self, most: float = 0.0) -> None:
        """Close so that a response reaches a peer that is still sending, for MOST seconds.

        Closing at once would answer what it sends with RST, which destroys what is in flight.
        """
        with contextlib.suppress(LocaltunnelError, OSError):    # it is gone, or too slow
            if self.transport.can_write_eof():
                self.transport.write_eof()
            deadline = self.runtime.now() + max(LINGER, most)
            left = LINGER
            while left > 0 and (self.unread or await self.wait_for_data(min(LINGER, left))):
                self.read_nowait(READ_SIZE)
                left = deadline - self.runtime.now()
        self.close()


async def end_task(task: asyncio.Task[Any]) -> None:
    """Cancel TASK and wait until it has ended.

    Cancels again and again: before Python 3.12 asyncio.wait_for swallows a cancel that arrives
    just as what it waits for is done.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=SWEEP)


FIRST_LOOK, LOOK_AGAIN = 0.001, 0.05    # until the first look, and between later ones


async def look_until(met: Callable[[], bool], seconds: float) -> bool:
    """Wait until MET(), at most for SECONDS, and return whether it is.  Looks often at first."""
    deadline, pause = time.monotonic() + seconds, FIRST_LOOK
    while not met():
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(pause)
        pause = min(2 * pause, LOOK_AGAIN)
    return True


async def both(first: Coroutine[Any, Any, None], second: Coroutine[Any, Any, None]) -> None:
    """Run two coroutines at the same time; when one fails, end the other and raise."""
    tasks = [asyncio.ensure_future(first), asyncio.ensure_future(second)]
    try:
        await asyncio.gather(*tasks)
    finally:
        while tasks:
            await end_task(tasks.pop())


Tap = Callable[[bytes], None]       # is shown what passes, piece by piece; it must not fail


async def pipe(source: ByteStream, sink: ByteStream, taps: Iterable[Tap] = ()) -> None:
    """Copy bytes from SOURCE to SINK until they end, and pass the end on; TAPS are shown them."""
    while True:
        data = await source.read()
        if not data:
            return await sink.write_eof()
        for tap in taps:
            tap(data)
        await sink.write(data)


async def join(left: ByteStream, right: ByteStream, left_taps: Iterable[Tap] = (),
               right_taps: Iterable[Tap] = ()) -> None:
    """Make two streams one conversation: bytes, half closes and resets pass both ways.

    LEFT_TAPS are shown what comes from LEFT, RIGHT_TAPS what comes from RIGHT.
    """
    left.timeout = right.timeout = NEVER      # a WebSocket may be silent for days
    try:
        await both(pipe(left, right, left_taps), pipe(right, left, right_taps))
    except (LocaltunnelError, OSError) as e:
        left.reset(CANCELLED, str(e))
        right.reset(CANCELLED, str(e))


# ------------------------------------------------------------------------------------------------
# 5. Session
#
# Streams over one connection.  Knows no HTTP and no names; whom a session or a stream serves
# (`facts`, `visitor`) it carries for others.
#
# Frames go from the socket straight into their streams; the reader never waits, and what frames
# cause (PONG, CREDIT, RESET) is merged and bounded.  What a turn of the loop brings leaves in one
# write, control frames first.  Streams write in turn, 64 KiB each.
#
# The four states of a session, as this side sees it, and the calls that lead to them:
#
#   RUNNING              streams open, run and end
#   WARNED    drain()    we said GOAWAY: streams go on, while the client makes a new session
#   CLOSING   leave()    no stream opens; it is over when the last one is, and all has arrived
#   OVER      end()      `error` says why; every stream was told
#
# drop() gives the connection up, and the session is OVER with it, unless it is of a kind that waits
# for another one (Resume).
# A wake runs the stream's task at once, and that may write, reset, or end the session.
# ------------------------------------------------------------------------------------------------

RUNNING, WARNED, CLOSING, OVER = range(4)       # states; see above
MAX_CREDIT = 1 << 31            # of a stream, in bytes: no window comes near it

Trace = Callable[[str, int, int, int], None]    # told direction, kind, stream, payload bytes


class SessionLost(StreamReset):
    """The session of a stream is over, as this side knows.

    A RESET that merely says SESSION_LOST stays a StreamReset: the other side could claim it.
    """

    def __init__(self, text: str) -> None:
        super().__init__(SESSION_LOST, text)


class Stream(ByteStream):
    """One conversation of a session.  It has no id until its first bytes are sent (OPEN)."""
    __slots__ = ('session', 'facts', 'id', 'credit', 'promised', 'window', 'on_lost', 'visitor',
                 '_end_sent', '_closed', '_taken')

    def __init__(self, session: Session, promised: int, credit: int, id: int = 0) -> None:
        """PROMISED bytes are taken from the session's budget."""
        ByteStream.__init__(self, session.runtime)      # on each request, and super() costs more
        self.session, self.facts, self.id = session, session.facts, id
        self.credit = credit            # bytes that we may still send
        self.promised = promised        # bytes that the other side may still send
        self._taken = promised          # of the budget, until there is a window
        self.window: ReceiveWindow | None = None        # made where CREDIT may be needed
        self.on_lost: Callable[[], None] | None = None          # the other side ended it
        self.visitor: Any = None        # whom it serves, at a server
        self._end_sent = False          # we said END
        self._closed = False            # all was given back

    def __repr__(self) -> str:
        return f'<Stream {self.id}>'

    async def write(self, data: Buffer, end: bool = False) -> None:
        rest = data
        while True:
            if self.error is not None:
                self.check()
            n = len(rest)
            if n > self.credit or n > MAX_PAYLOAD:
                n = min(self.credit, MAX_PAYLOAD)
            if (n or not rest) and self.session.outbox.my_turn(self):
                if n == len(rest):
                    return self._send(rest, end)
                rest = memoryview(rest)         # whose parts are not copies
                self._send(rest[:n], False)
                rest = rest[n:]
            else:
                await self._wait_for_room()         # for CREDIT, or for our turn

    async def write_eof(self) -> None:
        if not self._end_sent:
            await self.write(b'', end=True)

    def _send(self, data: Buffer, end: bool) -> None:
        session = self.session
        if self.id:
            kind = DATA
            if not end and not data:
                return
        else:
            kind, self.id = OPEN, session.number(self)
        self.credit -= len(data)
        session.outbox.add(kind | END if end else kind, self.id, data)
        if end:
            self._end_sent = True
            if self.eof:
                session.forget(self)

    def reset(self, code: int, text: str, error: LocaltunnelError | None = None) -> None:
        """End both directions; a task that waits here is told ERROR, or else the same."""
        if self.error is None and not (self._end_sent and self.eof):
            if self.id:
                self.session.outbox.reset(self.id, code, text)
            self.session.forget(self)
            self.set_exception(error or StreamReset(code, text))

    def close(self) -> None:
        """Give everything back; reset the stream if it is not over."""
        if not self._closed:
            self._closed = True
            if not (self._end_sent and self.eof):
                self.reset(DONE, 'done')
            self.on_lost = self.visitor = None
            self.session.budget.give(self.window.size if self.window else self._taken)

    def consumed(self, n: int) -> None:
        if not self._closed:
            now, round_trip = self.runtime.now(), self.session.liveness.round_trip
            self._promise(self._get_window().consumed(n, now, round_trip))

    def widen(self, size: int) -> None:
        if not self.eof:
            self._promise(self._get_window().widen(size))

    def _get_window(self) -> ReceiveWindow:
        if self.window is None:
            self.window = self.session.new_window(self._taken, self.session.budget)
        return self.window

    def _promise(self, n: int) -> None:
        """Let the other side send N bytes more."""
        if n:
            self.promised += n
            self.session.outbox.credit(self.id, n)

    # For the session.

    def data_arrived(self, data: bytes, end: bool) -> None:
        """Handle DATA or OPEN.  Raises ProtocolError."""
        if self.eof:
            raise ProtocolError('bytes after END')
        if end:
            self.eof = True
            if self._end_sent:
                self.session.forget(self)
        if data:
            self.promised -= len(data)
            if self.promised < 0:
                raise ProtocolError('more bytes than the credit')
            self.feed_data(data)
        elif end:
            self._readable.wake()

    def credit_arrived(self, n: int) -> None:
        """Handle CREDIT.  Raises ProtocolError."""
        self.credit += n
        if self.credit > MAX_CREDIT:
            raise ProtocolError('credit without bound')
        self.wake_writer()

    def over(self, error: LocaltunnelError) -> None:
        """Handle RESET, or the session's end.  A response that is here whole can still be read."""
        self.session.forget(self)
        self.set_exception(error)
        if self.on_lost:
            self.on_lost()


MAX_RESETS = 2 * MAX_STREAMS    # unwritten; past it the peer never reads
BATCH = 256 * KIB               # of frames in one write; more would only wait in the kernel
QUIET = 0.0001                  # after this silence, with few streams, a frame waits for no other
BURST = 8                       # frames that leave at once: the other side starts on them


class Outbox:
    """What a session sends: whose turn it is to write, and when all leaves.

    First CREDIT and PONG, merged; then the frames of streams, in order; RESET last.
    """

    def __init__(self, session: Session, trace: Trace | None) -> None:
        self.session, self.trace = session, trace
        self.turns: dict[Stream, None] = {}     # the streams that wait for their turn, in order
        self._called: Stream | None = None      # whose turn it is, of those that waited
        self.size = 0               # bytes of the frames in order
        self.sent = 0               # bytes of all that left
        self.confirmed = 0          # of these, have arrived there
        self.ask_after = NEVER      # of `sent`: past this a PING asks for the count, see Resume
        self.keep: Callable[[bytes], None] | None = None        # is given what leaves, see Resume
        self.credits: dict[int, int] = {}       # what CREDIT will promise to each stream
        self.resets: dict[int, bytes] = {}      # payloads, by stream
        self.pong = False           # True: a PONG is due, one for all PINGs that came together
        self.flush_due = False      # at the end of this turn of the loop
        self.added = 0              # frames since something left
        self._left_at = 0.0         # and when that was
        self._frames: list[Buffer] = []         # in order: headers and payloads

    def add(self, kind: int, stream: int, payload: Buffer = b'') -> None:
        """Send one frame behind those that are here."""
        frames, n = self._frames, len(payload)
        frames.append(FRAME_HEADER.pack(kind << 24 | n, stream))
        if n:
            frames.append(payload)
        self.size += 8 + n
        if self.trace:
            self.trace('->', kind, stream, n)
        self.schedule()

    def credit(self, stream: int, n: int) -> None:
        """Promise N bytes more."""
        self.credits[stream] = self.credits.get(stream, 0) + n
        self.schedule()

    def reset(self, stream: int, code: int, text: str) -> None:
        """Say that STREAM is over, and why."""
        self.resets[stream] = encode_reason(code, text)
        self.schedule()

    def confirm(self, n: int) -> None:
        """Note that N bytes have arrived in all.  Raises ProtocolError."""
        if n > self.sent:
            raise ProtocolError('more acknowledged than was sent')
        self.confirmed = n

    def my_turn(self, stream: Stream) -> bool:
        """True if STREAM may send a frame now; else it is called up when its turn comes.

        Raises SessionLost.
        """
        if (not self.turns or stream is self._called) and self.has_room():
            self._called = None
            return True
        if self.session.error is not None:
            raise SessionLost(str(self.session.error))
        self.turns[stream] = None
        return False

    def has_room(self) -> bool:
        """True if streams may send now."""
        connection = self.session.connection
        return self.size < BATCH and connection is not None and not connection.writing_paused

    def _call_up(self) -> None:
        """Let the streams that wait write in turn, while there is room."""
        loop = self.session.runtime.loop
        if asyncio.current_task(loop) is not None:      # that one goes on first
            if not self.flush_due:
                self.flush_due = True
                loop.call_soon(self.flush, True)
            return
        for _ in range(len(self.turns)):
            if not self.has_room() or not self.turns:
                break
            self._called = stream = next(iter(self.turns))
            del self.turns[stream]
            stream.wake_writer()
        self._called = None

    def schedule(self) -> None:
        """Flush at the end of this turn of the loop, or at once where that is better."""
        self.added += 1
        session = self.session
        if self.flush_due:
            if self.added >= BURST:
                self.flush()
        elif len(session.streams) < BURST and session.runtime.now() - self._left_at > QUIET:
            self.flush()        # with more streams others will come, however long each takes
        else:
            self.flush_due = True
            session.runtime.loop.call_soon(self.flush, True)

    def flush(self, turn_over: bool = False) -> None:
        """Let those whose turn it is write, and send all that is here."""
        session = self.session
        if turn_over:
            self.flush_due = False
        while True:
            if self.turns:
                self._call_up()
            connection = session.connection
            if (connection is None or connection.writing_paused
                    or connection.transport.is_closing()):      # a send failed in this turn
                break
            data = self.take()
            if not data:
                break
            self._left_at = session.runtime.now()
            connection.transport.write(data)
            if self.sent >= self.ask_after:
                session.ping()
            elif not self.turns:
                break
        if session.state == CLOSING:
            session.finish()

    def take(self) -> bytes:
        """Return all that leaves now."""
        if self.credits or self.resets or self.pong:
            self._merge()
        data = b''.join(self._frames)
        self._frames.clear()
        self.size = self.added = 0
        self.sent += len(data)
        if data and self.keep:
            self.keep(data)
        return data

    def _merge(self) -> None:
        front = [(CREDIT, id, U32.pack(n)) for id, n in self.credits.items()]
        if self.pong:
            front.append((PONG, 0, U64.pack(self.session.decoder.received)))
        back = [(RESET, id, payload) for id, payload in self.resets.items()]
        self._frames[:0] = [encode_frame(*frame) for frame in front]
        self._frames += [encode_frame(*frame) for frame in back]
        self.credits.clear()
        self.resets.clear()
        self.pong = False
        if self.trace:
            for kind, id, payload in front + back:
                self.trace('->', kind, id, len(payload))


STALLED_SESSION = 20.0          # without progress in a write


class Liveness:
    """When to ask whether the other side is there, and when to give the connection up.

    Knows no clock: callers bring `now`.  The client's side keeps the session alive (`pings`); the
    server's has more patience.
    """
    __slots__ = ('pings', 'heard', 'round_trip', 'asked_at', '_after', '_moved_at', '_unsent')

    def __init__(self, pings: bool, now: float) -> None:
        self.pings = pings
        self.heard = now            # when something arrived last
        self.round_trip = ROUND_TRIP
        self.asked_at = NEVER       # when the PING left whose PONG is awaited; NEVER for none
        self._after = 0             # and behind how many bytes
        self._moved_at = now        # when the kernel took something last
        self._unsent = 0            # bytes that it had not taken at the last look

    def asked(self, now: float, sent: int) -> None:
        """A PING leaves behind SENT bytes."""
        if self.asked_at == NEVER:
            self.asked_at, self._after = now, sent

    def answered(self, confirmed: int) -> None:
        """A PONG came, by which CONFIRMED bytes have arrived there."""
        if self.asked_at != NEVER and confirmed >= self._after:
            self.round_trip, self.asked_at = self.heard - self.asked_at, NEVER

    def quiet(self, now: float) -> bool:
        """True if nothing can be due while nothing is to be sent, as in thousands of sessions."""
        return not self._unsent and self.asked_at == NEVER and now - self.heard < PONG_WITHIN

    def ping_due(self, now: float, unsent: int, woke_up: bool) -> bool:
        """True if a PING is due.  UNSENT bytes were not taken by the kernel; the machine WOKE_UP.

        Raises Disconnected where the connection must be given up.
        """
        silence = now - self.heard
        if unsent != self._unsent:
            self._unsent, self._moved_at = unsent, now
        if unsent and now - self._moved_at > STALLED_SESSION:
            raise Disconnected(f'{unsent} bytes were not taken in {STALLED_SESSION:.0f} s')
        if self.asked_at != NEVER:
            if self.pings and now - max(self.asked_at, self.heard) > PONG_WITHIN:
                raise Disconnected(f'no reply to a ping within {PONG_WITHIN:.0f} s')
        elif silence > (PING_AFTER if self.pings else PING_AFTER + PONG_WITHIN) or (
                woke_up and self.pings):
            return True
        if silence > SILENT_SESSION:
            raise Disconnected(f'nothing was heard for {SILENT_SESSION:.0f} s')
        return False


class Session:
    """Streams over one connection.

    A client passes in `on_open(stream)`, for the streams that its server opens: App.serve.  Both
    sides set `on_change()`, which is told of a lost connection, of a GOAWAY, and of the end.
    """
    facts = UNSERVED                # at a server: whose it is
    lost_at = NEVER                 # when it lost a connection that another may replace, see Resume

    def __init__(self, runtime: Runtime, process: Budget | None = None,
                 trace: Trace | None = None, window: type[ReceiveWindow] = ReceiveWindow,
                 on_open: Callable[[Stream], None] | None = None) -> None:
        """PROCESS is what all sessions have together.  WINDOW makes those of streams."""
        self.runtime = runtime
        self.state = RUNNING        # see the table above
        self.error: LocaltunnelError | None = None          # why it is OVER
        self.goaway: tuple[int, str] | None = None          # what the other side said
        self.connection: Connection | None = None           # None before it came, and once lost
        self.streams: dict[int, Stream] = {}    # those not over, by id
        self.last_id = 0            # of a stream, by either side: how many there have been
        self.budget = Budget(SESSION_BUDGET, process)       # of all windows
        self.new_window = window
        self.decoder = Decoder()    # what was received, and how much
        self.outbox = Outbox(self, trace)       # what is to be sent, and how much was
        self.liveness = Liveness(on_open is not None, runtime.now())        # of the connection
        self.on_open = on_open      # None at the server's side, which opens the streams
        self.on_change: Callable[[], None] = lambda: None   # set once, by the owner
        self._first_credit = INITIAL_CREDIT     # of new streams, as the server said last
        self._all_sent = NEVER      # bytes that we had to say in all; known when we close
        runtime.swept.add(self)

    # Streams.

    def open_stream(self) -> Stream | None:
        """Return a new stream to the other side, or None if there are too many."""
        if self.error is not None or len(self.streams) >= MAX_STREAMS:
            return None
        budget, used = self.budget, self.budget.used    # half, or a quarter, stays for others
        size = (INITIAL_CREDIT if budget.take(INITIAL_CREDIT, leave=used) else
                SMALL_CREDIT if budget.take(SMALL_CREDIT, leave=used // 3) else
                LEAST_CREDIT if budget.take(LEAST_CREDIT) else 0)
        return Stream(self, size, INITIAL_CREDIT) if size else None

    @property
    def usable(self) -> bool:
        """True if a new stream can be opened here, now."""
        return self.connection is not None and self.state < CLOSING and self.goaway is None

    def number(self, stream: Stream) -> int:
        """Return an id for STREAM, which is about to be opened."""
        if stream.promised != self._first_credit:       # said now, so that it counts for this one
            self._first_credit = stream.promised
            self.outbox.add(CREDIT, 0, U32.pack(self._first_credit))
        self.last_id += 1
        self.streams[self.last_id] = stream
        return self.last_id

    def forget(self, stream: Stream) -> None:
        """Drop STREAM, which is over both ways."""
        outbox = self.outbox
        self.streams.pop(stream.id, None)
        outbox.turns.pop(stream, None)
        outbox.credits.pop(stream.id, None)
        if self.state == CLOSING and not self.streams:
            outbox.schedule()       # it closes once all has left

    # Frames in.

    def _receive(self, data: Buffer) -> None:
        self.liveness.heard = self.runtime.now()
        decoder, outbox = self.decoder, self.outbox
        behind, flush_due = decoder.behind, outbox.flush_due
        outbox.flush_due = True     # what this read causes leaves after it
        try:
            try:
                for kind, id, payload in decoder.feed(data):
                    if self.error is not None:
                        return
                    if outbox.trace:
                        outbox.trace('<-', kind, id, len(payload))
                    self._dispatch(kind, id, payload)
            finally:
                outbox.flush_due = flush_due
            if outbox.added or outbox.turns or self.state == CLOSING:
                outbox.flush()
                if len(outbox.resets) > MAX_RESETS:
                    raise ProtocolError('replies pile up and are not read')
            if decoder.behind and not behind:
                self._fall_behind()
        except ProtocolError as e:
            self.end(e)

    def _fall_behind(self) -> None:
        """Let others have a turn, and read no more: one read may hold 30,000 frames."""
        if self.connection is not None:
            with contextlib.suppress(AttributeError):   # before Python 3.11 TLS that has just ended
                self.connection.transport.pause_reading()
        self.runtime.loop.call_soon(self._catch_up, self.connection)

    def _catch_up(self, connection: Connection | None) -> None:
        if connection is not None:
            with contextlib.suppress(AttributeError):       # see above
                connection.transport.resume_reading()
        self.decoder.behind = False
        self._receive(b'')

    def _dispatch(self, kind: int, id: int, payload: bytes) -> None:
        """One frame, which Decoder found in order.  Raises ProtocolError."""
        stream = self.streams.get(id)
        if stream is not None and kind & ~END == DATA:
            stream.data_arrived(payload, kind & END != 0)
        elif kind & ~END == OPEN:
            self._opened(id, payload, kind & END != 0)
        elif id > self.last_id:
            raise ProtocolError(f'a frame for stream {id}, which was never opened')
        elif kind == CREDIT:
            n = U32.unpack(payload)[0]
            if stream is not None:
                stream.credit_arrived(n)
            elif id == 0:
                self._first_credit = min(n, INITIAL_CREDIT)
        elif kind == RESET:
            if stream is not None:
                stream.over(StreamReset(*decode_reason(payload)))
        elif kind == GOAWAY:
            if self.goaway is None:
                self.goaway = decode_reason(payload)
                self.on_change()
        elif id == 0:       # PING or PONG; the rest is DATA for a stream that is over
            self.outbox.confirm(U64.unpack(payload)[0])
            if kind == PONG:
                self.liveness.answered(self.outbox.confirmed)
            else:
                self.outbox.pong = True
                self.outbox.schedule()

    def _opened(self, id: int, payload: bytes, end: bool) -> None:
        if self.on_open is None or id != self.last_id + 1:
            raise ProtocolError(f'OPEN of stream {id}')
        self.last_id = id
        if len(self.streams) >= MAX_STREAMS or not self.budget.take(INITIAL_CREDIT):
            return self.outbox.reset(id, OVERLOADED, 'too many streams')
        stream = self.streams[id] = Stream(self, INITIAL_CREDIT, self._first_credit, id)
        stream.data_arrived(payload, end)
        self.on_open(stream)

    # The connection.

    def attach(self, connection: Connection, said: Facts | None = None) -> None:
        """Begin on CONNECTION; SAID is the welcome of the other side, at a client."""
        self.connection = connection
        connection.receiver, connection.on_room = self._receive, self.outbox.flush
        connection.on_lost = connection.on_eof = self.drop
        self.runtime.swept.discard(connection)      # nobody waits on it
        while connection.unread:
            self._receive(memoryview(connection.read_nowait(sys.maxsize)))
        self.ping()

    def drop(self, why: str = 'the session ended') -> None:
        """Give up the connection, and so the session."""
        connection = self._let_go()
        if connection is not None:
            connection.abort()
            self.end(Disconnected(why))

    def _let_go(self) -> Connection | None:
        """Return the connection, if there is one; it is no longer this session's."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.receiver = connection.on_lost = connection.on_eof = connection.on_room = None
        return connection

    async def must_answer(self, within: float) -> None:
        """Give the connection up unless something is heard WITHIN this many seconds."""
        asked = self.runtime.now()
        self.ping()
        if not await look_until(lambda: not self.connection or self.liveness.heard >= asked,
                                within):
            self.drop(f'no answer to a ping in {within:.0f} s')

    def sweep(self, now: float, woke_up: bool) -> None:
        """Ping after a silence, and give the connection up if it goes on."""
        if self.connection is None:
            return
        if not (self.streams or self.outbox.turns or woke_up) and self.liveness.quiet(now):
            return
        for stream in [*self.streams.values(), *self.outbox.turns]:
            stream.end_waits(now)
        unsent = self.connection.transport.get_write_buffer_size()
        try:
            if self.liveness.ping_due(now, unsent, woke_up):
                self.ping()
        except Disconnected as e:
            self.drop(str(e))

    def ping(self) -> None:
        """Ask the other side whether it is there, and how much has arrived."""
        self.liveness.asked(self.runtime.now(), self.outbox.sent)
        self.outbox.add(PING, 0, U64.pack(self.decoder.received))

    # Seams, as are attach() and drop(): for a session that goes on over another connection.

    def welcome(self) -> Facts:
        """Return what a server tells the client of it."""
        return {}

    def claim(self) -> Facts:
        """Return what a client says in its next hello, to go on with it."""
        return {}

    def goes_on(self, welcome: Facts) -> bool:
        """True if it goes on over another connection, by WELCOME; else it is over."""
        return False

    # The end.

    def finish(self) -> None:
        """End the session, which is CLOSING, if nothing is left to do."""
        outbox = self.outbox
        if not (self.streams or outbox.turns or outbox.size):
            if self._all_sent == NEVER:     # what crossed our GOAWAY arrives before this PONG
                self._all_sent = outbox.sent
                self.ping()
            elif outbox.confirmed >= self._all_sent:
                self.end(Disconnected('the session ended'))

    def drain(self, code: int, text: str) -> None:
        """Ask the other side for a new session; this one still carries its streams."""
        if self.state == RUNNING:
            self.state = WARNED
            self.outbox.add(GOAWAY, 0, encode_reason(code, text))

    def leave(self, code: int, text: str, within: float = NEVER) -> None:
        """Say GOAWAY, and end when the streams are over, or after WITHIN seconds."""
        if self.connection is None:
            return self.end(Disconnected(text))     # nobody is there to finish them
        self.drain(code, text)
        self.state = max(self.state, CLOSING)       # never back
        if within != NEVER:
            self.runtime.loop.call_later(within, self.end, Disconnected(text))
        self.outbox.schedule()

    def end(self, error: LocaltunnelError) -> None:
        """End it for ERROR: tell what still runs, and a peer that broke the protocol."""
        if self.error is not None:
            return
        self.error = error
        if isinstance(error, ProtocolError):
            self.drain(PROTOCOL_BROKEN, str(error))
            self.outbox.flush()
        self.state = OVER
        self.runtime.swept.discard(self)
        connection = self._let_go()
        if connection is not None:
            self.runtime.swept.add(connection)
            if self.outbox.confirmed >= self._all_sent:      # all has arrived there
                connection.close()
            else:
                self.runtime.spawn(connection.linger())
        lost = SessionLost(str(error))
        for stream in [*self.streams.values(), *self.outbox.turns]:
            stream.over(lost)
        self.on_change()


# ------------------------------------------------------------------------------------------------
# 6. HTTP/1.1
#
# RFC 9110 and 9112, strictly: what could be read in two ways is refused, never repaired.  First the
# pure part: heads, body framing, forwarding; then a thin shell that reads and copies.
#
# A head keeps its header lines as one block, as they came: order, case and bytes.  Only those that
# decide something here are interpreted, and lines that must not go on are cut out.
# The length of a body is a number, or one of two words:
# ------------------------------------------------------------------------------------------------

CHUNKED, UNTIL_CLOSE = -1, -2
MAX_LENGTH_DIGITS = 18      # what fits in 63 bits

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_VALUE = rb'[\t\x20-\x7e\x80-\xff]*'
_LINES = rb'\r\n((?s:.*))\r\n'     # of the header, which _FIELDS reads
_FIELDS = re.compile(rb'(?:' + _TOKEN + rb':' + _VALUE + rb'\r\n)*')
_REQUEST = re.compile(rb'(' + _TOKEN + rb') ([!"\x24-\x7e\x80-\xff]+) HTTP/1\.([0-9])' + _LINES)
_RESPONSE = re.compile(rb'HTTP/1\.([0-9]) ([1-9][0-9][0-9])((?: ' + _VALUE + rb')?)' + _LINES)
_REQUEST_LINE = re.compile(rb'(' + _TOKEN + rb') ([^ \t\r\n]+) HTTP/([0-9]\.[0-9])\r\n')
_FIRST_LINE = re.compile(rb'(?:HTTP/1\.[0-9] [^\r\n]*|[^\r\n]* HTTP/1\.[0-9])\r\n')
_MORE_CODINGS = re.compile(rb'(?:(?!chunked[ \t]*,)' + _TOKEN + rb'[ \t]*,[ \t]*)+chunked')
_CHUNK_LINE = re.compile(rb'([0-9A-Fa-f]{1,15})(?:[ \t]*;' + _VALUE + rb')?\r\n')
_BARE_LF = re.compile(rb'(?:^|[^\r])\n')
_HOST = re.compile(rb'([a-z0-9._~-]+|\[[0-9a-f:.]+\])(?::[0-9]{0,5})?')
_ABSOLUTE = re.compile(rb'([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^#]*)')
# The fields that are interpreted, in a lower-case block with LF in front.
_KNOWN = re.compile(rb'\n(host|con(?:tent-length|nection)|transfer-encoding|te|upgrade|keep-alive'
                    rb'|via|date|accept|authorization|www-authenticate'
                    rb'|proxy-(?:connection|auth(?:orization|enticate))'
                    rb'|localtunnel-(?:failed|hello|kept|replay|user|welcome)'
                    rb'|x-forwarded-(?:for|proto|host)'
                    rb'|set-cookie|clear-site-data|max-forwards):'
                    rb'[ \t]*([^\r]*[^ \t\r]|)')
# The fields that no visitor may send.  Here `_` stands for each sign that CGI and its heirs turn
# into `_`, as they do with the hyphen, and `~` for each but the hyphen: to the app it would be a
# second field of that name.
UNTRUSTED = (
    rb'x_(?:forwarded(?:_[^:]*)?|(?:cluster_)?client_ip|real_ip|rewrite_url'
    rb'|original_(?:host|ur[il]|forwarded_[^:]*))|f(?:orwarded(?:_for)?|(?:ast)?ly_client_ip)'
    rb'|c(?:f_connecting_ip(?:v6)?|lient_ip|ontent~length)|t(?:rue_client_ip|ransfer~encoding)'
    rb'|proxy|localtunnel_[^:]*|http2_settings'
).replace(b'_', rb'[^a-z0-9:]').replace(b'~', rb'[^a-z0-9:-]')
_UNTRUSTED = re.compile(rb'\n(' + UNTRUSTED + rb'):')
# Later requests in HTTP/2, or in HTTP inside TLS, would bypass every check made here.
_HTTP_AGAIN = re.compile(rb'(?i)(?:^|,)[ \t]*"*(?:h[23]|http|tls/|connect-)[^,]*')
MAX_NOMINATED = 20          # names in Connection
MAX_WORDS = 100             # of a field that is a list; even empty ones count

# These belong to one hop (RFC 9110 7.6.1).
HOP_BY_HOP = frozenset((b'connection', b'keep-alive', b'proxy-connection', b'te', b'upgrade',
                        b'transfer-encoding'))
CONNECTION_OPTIONS = frozenset((b'close', b'keep-alive', b'upgrade', b'te'))
# Nor may an app send these: only we say that a hop failed, and the like.
NOT_OF_APPS = HOP_BY_HOP.union((b'localtunnel-failed', b'localtunnel-kept', b'localtunnel-replay',
                                b'localtunnel-user'))
NOT_OF_INTERIM = NOT_OF_APPS.union((b'set-cookie', b'clear-site-data'))
# A Connection that names one of these would take away what routing and framing rely on.
NOT_NOMINATED = re.compile(rb'(?:host|content-length|transfer-encoding)$|x[-_]forwarded[-_]')
# Routing, framing and trust never rely on trailers (RFC 9110 6.5.1), which apps may merge: these
# are dropped.
NO_TRAILER = re.compile(rb'(?im)^(?:host|content-length|transfer-encoding|connection|via'
                        rb'|authorization|cookie|set-cookie|' + UNTRUSTED + rb'):.*\n')
IDEMPOTENT = frozenset((b'GET', b'HEAD', b'OPTIONS', b'TRACE', b'PUT', b'DELETE'))


class Head:
    """What requests and responses share.

    `block` holds the header lines, each with its CR LF.  `fields` holds the values of known fields
    in lower case; repeated ones are joined with a comma (RFC 9110 5.3).  `connection` holds the
    words of Connection.  `old` says that the sender speaks HTTP/1.0: no chunks, no 1xx, no Upgrade;
    later ones than 1.1 are read as that (RFC 9110 2.5).  `keep_alive` says that it wants to use the
    connection again.
    """
    __slots__ = ('old', 'block', 'fields', 'connection', 'keep_alive', '_lower', '_onward')
    bodiless = False                # of a response: one with its status has no body and no length

    def __init__(self, minor: bytes, block: bytes) -> None:
        """Raises BadHttp."""
        if not _FIELDS.fullmatch(block):
            raise BadHttp(400, 'a malformed header field')
        self.old, self.block = minor == b'0', block
        self._lower = b'\n' + block.lower()
        self._onward: dict[tuple[frozenset[bytes], bool], bytes] = {}       # what onward() said
        found = _KNOWN.findall(self._lower)
        self.fields: dict[bytes, bytes] = dict(found)
        if len(self.fields) < len(found):
            self.fields = {name: b', '.join(value for key, value in found if key == name)
                           for name in self.fields}
        self.connection: Sequence[bytes] = ()
        if b'connection' in self.fields:
            self.connection = self.fields[b'connection'].split(b',', MAX_WORDS)
            if len(self.connection) > MAX_WORDS:
                raise BadHttp(400, f'Connection has more than {MAX_WORDS} words')
            if len(self.connection) > 1:
                self.connection = [word.strip() for word in self.connection]
        self.keep_alive = b'close' not in self.connection and (
            not self.old or b'keep-alive' in self.connection)

    def get(self, name: bytes) -> bytes:
        """Return the value of a known field as it came; b'' if there is none."""
        if name not in self.fields:
            return b''
        return b', '.join(self.block[m.start(2) - 1:m.end(2) - 1]
                          for m in _KNOWN.finditer(self._lower) if m.group(1) == name)

    def has(self, name: bytes) -> bool:
        """Return True if there is a field called NAME, known or not."""
        return b'\n%b:' % name in self._lower

    def find(self, name: bytes) -> str:
        """Return the value of the first field called NAME, known or not, as text; or ''."""
        found = re.search(rb'\n%b:[ \t]*([^\r]*)' % name, b'\n' + self.block, re.IGNORECASE)
        return found.group(1).decode('latin-1').rstrip() if found else ''

    def hop_by_hop(self, dropped: frozenset[bytes] = HOP_BY_HOP) -> set[bytes]:
        """Return the names of the fields that must not go on, DROPPED ones too.  Raises BadHttp."""
        names = {*dropped.intersection(self.fields)}
        for word in self.connection:
            if word not in CONNECTION_OPTIONS:
                if NOT_NOMINATED.match(word):
                    raise BadHttp(400, f'Connection names {word.decode("latin-1")}')
                if b':' not in word:        # else it is not a name
                    names.add(word)
        if len(names) > MAX_NOMINATED:
            raise BadHttp(400, f'Connection names more than {MAX_NOMINATED} fields')
        return names

    def untrusted(self) -> list[bytes]:
        """Return the names of fields that only a proxy may send: an app could believe them."""
        return _UNTRUSTED.findall(self._lower)

    def without(self, names: Iterable[bytes]) -> bytes:
        """Return the block without the lines of NAMES."""
        block, lower = self.block, self._lower
        for name in names:
            at = lower.find(b'\n%b:' % name)
            while at >= 0:
                end = lower.index(b'\n', at + 1)
                block, lower = block[:at] + block[end:], lower[:at] + lower[end:]
                at = lower.find(b'\n%b:' % name, at)
        return block

    def onward(self, dropped: frozenset[bytes] = HOP_BY_HOP, trusted: bool = True) -> bytes:
        """Return the lines to pass on: without those DROPPED, and unless TRUSTED those untrusted.

        Raises BadHttp.
        """
        if self.bodiless:
            dropped = dropped.union((b'content-length',))
        if trusted and not self.connection and dropped.isdisjoint(self.fields):
            return self.block       # as from the other end of a tunnel
        block = self._onward.get((dropped, trusted))
        if block is None:
            names = self.hop_by_hop(dropped)
            if not trusted:
                names.update(self.untrusted())
            block = self._onward[dropped, trusted] = self.without(names)
        return block

    def _body_length(self, otherwise: int) -> int:
        """The length of the body: bytes, CHUNKED, or OTHERWISE where nothing is said of it.

        Raises BadHttp (RFC 9112 6.1, 6.3).
        """
        fields = self.fields
        if b'transfer-encoding' in fields:
            codings = fields[b'transfer-encoding']
            if codings != b'chunked':
                raise BadHttp(501 if _MORE_CODINGS.fullmatch(codings) else 400,
                              'a Transfer-Encoding other than a single chunked')
            if b'content-length' in fields:
                raise BadHttp(400, 'both Transfer-Encoding and Content-Length')
            if self.old:
                raise BadHttp(400, 'Transfer-Encoding in HTTP/1.0')
            return CHUNKED
        if b'content-length' not in fields:
            return otherwise
        value = fields[b'content-length']
        if not value.isdigit() or len(value) > MAX_LENGTH_DIGITS:
            raise BadHttp(400, 'Content-Length is not a single number')
        return int(value)


# A visitor's next head is mostly the same as the last, or has the same lines below another target.
# So whole heads are remembered (parse_request), and so are the lines of requests (request_lines).
# With the largest heads this takes 18 MiB, for half a second.
RECENT = 16                     # of each are remembered, until the next sweep: see forget_heads


class RequestLines(Head):
    """The header lines of a request.

    `host` is its Host in lower case, `host_name` the same without port, as text.
    `upgrade` is the protocol that the sender would like to switch to (RFC 9110 7.8); b'' if
    there is none but HTTP itself.  `length` is that of the body: bytes, or CHUNKED.
    """
    __slots__ = ('host', 'host_name', 'upgrade', 'length')

    def __init__(self, minor: bytes, block: bytes) -> None:
        Head.__init__(self, minor, block)
        self.host, self.host_name, self.upgrade = self.fields.get(b'host', b''), '', b''
        match = _HOST.fullmatch(self.host)
        if match:
            self.host_name = match.group(1).decode().rstrip('.')
        elif not self.old or b'host' in self.fields:
            raise BadHttp(400, 'Host is missing, malformed or repeated')
        if b'upgrade' in self.connection and not self.old:
            self.upgrade = _HTTP_AGAIN.sub(b'', self.get(b'upgrade')).strip(b', \t')
        self.length = self._body_length(0)


request_lines = functools.lru_cache(RECENT)(RequestLines)


class Request(RequestLines):
    """A request head, with what is known of its lines.  `target` is in origin form or '*'."""
    __slots__ = ('method', 'target')

    def __init__(self, method: bytes, target: bytes, minor: bytes, block: bytes) -> None:
        self.method, self.target = method, target
        known = request_lines(minor, block)
        (self.old, self.block, self.fields, self.connection, self.keep_alive, self._lower,
         self._onward, self.host, self.host_name, self.upgrade, self.length) = (
             known.old, block, known.fields, known.connection, known.keep_alive, known._lower,
             known._onward, known.host, known.host_name, known.upgrade, known.length)
        if method == b'CONNECT' or target[:1] != b'/' and (target, method) != (b'*', b'OPTIONS'):
            self._check_target()

    def _check_target(self) -> None:
        if self.method == b'CONNECT':
            raise BadHttp(501, 'CONNECT is for proxies, and this is a server')
        match = _ABSOLUTE.fullmatch(self.target)
        if not match or match.group(1).lower() not in (b'http', b'https'):
            raise BadHttp(400, 'the request target is neither a path nor an http URL')
        usual = rb':(?:80)?$' if match.group(1).lower() == b'http' else rb':(?:443)?$'
        named = _HOST.fullmatch(match.group(2).lower())
        if not named or re.sub(usual, b'', named.group()) != re.sub(usual, b'', self.host):
            if self.host or not named:      # HTTP/1.0 may name it in the target alone
                raise BadHttp(400, 'the request target and Host name different hosts')
            self.host, self.host_name = named.group(), named.group(1).decode().rstrip('.')
        self.target = match.group(3)
        if self.target[:1] != b'/':
            self.target = b'/' + self.target if self.target or self.method != b'OPTIONS' else b'*'


class Response(Head):
    """A response head; `reason` has its leading space, or is empty."""
    __slots__ = ('status', 'reason', 'bodiless', '_length')

    def __init__(self, minor: bytes, status: bytes, reason: bytes, block: bytes) -> None:
        Head.__init__(self, minor, block)       # super() costs more
        self.status, self.reason = int(status), reason
        self.bodiless = self.status < 200 or self.status == 204
        self._length: int | None = None         # of a body, once it was asked for

    def body_length(self, method: bytes) -> int:
        """The length of the body in answer to METHOD, perhaps UNTIL_CLOSE.  Raises BadHttp."""
        if self._length is None:
            self._length = self._body_length(UNTIL_CLOSE)
        return 0 if self.bodiless or method == b'HEAD' or self.status == 304 else self._length


def logs_in(request: Request, response: Response) -> bool:
    """Return True if this is a login that may apply to everything on the connection."""
    asked, told = request.fields, response.fields
    if not (b'authorization' in asked or b'www-authenticate' in told
            or b'proxy-authorization' in asked or b'proxy-authenticate' in told):
        return False
    return any(scheme in value for fields in (asked, told) for name, value in fields.items()
               if name.endswith((b'authorization', b'authenticate'))
               for scheme in (b'ntlm', b'negotiate'))


def check_upgrade(request: Request, response: Response) -> None:
    """Raise BadHttp if a 101 RESPONSE does not match REQUEST (RFC 9110 7.8)."""
    asked, got = ({word.strip() for word in value.lower().split(b',', MAX_WORDS)}
                  for value in (request.upgrade, response.get(b'upgrade')))
    if not request.upgrade or b'' in got or not got <= asked:
        raise BadHttp(502, 'it switched to a protocol that nobody asked for')


@functools.lru_cache(RECENT)
def parse_request(head: bytes) -> Request:
    """Parse HEAD, up to and including its empty line; equal ones may share it.  Raises BadHttp."""
    match = _REQUEST.fullmatch(head)
    if match:
        if match.end(2) > MAX_LINE:
            raise BadHttp(414, f'a request line of more than {MAX_LINE} bytes')
        return Request(*match.groups())
    line = _REQUEST_LINE.match(head)
    if line and line.group(3)[:1] != b'1':
        raise BadHttp(505, 'only HTTP/1.1 and HTTP/1.0 are spoken here')
    if line and b'#' in line.group(2):
        raise BadHttp(400, 'a request target with a fragment (#)')
    if head.startswith(b'\r\n'):       # one empty line before it is ignored (RFC 9112 2.2)
        return parse_request(head[2:])
    if head.startswith(b'PRI * HTTP/2.0\r\n'):
        raise BadHttp(505, 'HTTP/2 is not spoken here')
    raise BadHttp(400, 'a malformed request line')


@functools.lru_cache(RECENT)
def parse_response(head: bytes) -> Response:
    """Parse HEAD, of a response; equal ones may share it.  Raises BadHttp."""
    match = _RESPONSE.fullmatch(head)
    if not match:
        raise BadHttp(502, 'a malformed status line')
    return Response(*match.groups())


def forget_heads() -> None:
    """Forget all heads; called at each sweep."""
    for known in (parse_request, parse_response, request_lines):
        known.cache_clear()


def encode_request(request: Request, block: bytes, chunked: bool = False) -> bytes:
    """Return the head to pass on: the header lines in BLOCK, and those of this hop."""
    if request.upgrade:
        block += b'Connection: Upgrade\r\nUpgrade: %b\r\n' % request.upgrade
    if chunked:
        block += b'Transfer-Encoding: chunked\r\n'
    return b'%b %b HTTP/1.1\r\n%b\r\n' % (request.method, request.target, block)


def encode_response(response: Response, block: bytes, chunked: bool = False) -> bytes:
    """Return the head to pass on: the header lines in BLOCK, and those of this hop."""
    upgrade = response.get(b'upgrade') if response.status in (101, 426) else b''
    if upgrade:
        block += b'Connection: Upgrade\r\nUpgrade: %b\r\n' % upgrade
    if chunked:
        block += b'Transfer-Encoding: chunked\r\n'
    return b'HTTP/1.1 %d%b\r\n%b\r\n' % (response.status, response.reason or b' ', block)


class Body:
    """A message body that arrives on `stream`: LEFT bytes, or all until the stream ends (NEVER).

    `take` returns what is here, b'' if more is needed; `taken` counts it.  Once it is `finished`,
    nothing may be taken again.  `busy` is True if it took long and more may be here.
    """
    __slots__ = ('stream', 'left', 'taken', 'finished', 'busy')
    whole: bytes | None = None      # all of it, where it came in one piece: see WholeBody
    trailers = b''

    def __init__(self, stream: ByteStream, left: float) -> None:
        self.stream, self.left, self.taken, self.finished = stream, left, 0, False
        self.busy = False

    def take(self) -> bytes:
        """Return what is here.  Raises BadHttp if chunks are malformed."""
        piece = self.stream.read_nowait(self.left)
        n = len(piece)
        self.taken += n
        self.left -= n
        self.finished = not self.left
        return piece

    def stream_ended(self) -> None:
        """Take the end of the stream for that of the body.  Raises Incomplete if it is not."""
        if self.left != NEVER:
            raise Incomplete(f'{self.left} bytes are missing')
        self.finished = True


STEPS_TOGETHER = 512            # of one chunked body in a turn, three a chunk: then others come


class ChunkedBody(Body):
    """Chunks; their extensions are dropped, the trailers kept but for those of NO_TRAILER.

    Chunks that are here are taken together: where one ends means nothing, but costs much.
    """
    __slots__ = ('trailers', '_state')
    # Bytes of a line; that of a trailer may wait behind a quarter of the stream's window.
    LIMITS = {'size': MAX_CHUNK_LINE, 'data end': 2, 'trailer': MAX_HEAD // 2}

    def __init__(self, stream: ByteStream) -> None:
        super().__init__(stream, NEVER)
        self.trailers = b''
        self._state = 'size'        # in 'data' `left` is what is left of this chunk

    def take(self) -> bytes:
        pieces: list[bytes] = []
        size = steps = 0
        while not self.finished and size < MAX_PAYLOAD and steps < STEPS_TOGETHER:
            steps += 1
            if self._state == 'data':
                piece = self.stream.read_nowait(self.left)
                if not piece:
                    break
                pieces.append(piece)
                size += len(piece)
                self.left -= len(piece)
                if not self.left:
                    self._state = 'data end'
                continue
            limit = self.LIMITS[self._state]
            line = self.stream.readline_nowait(limit)
            if line is None:
                if self.stream.unread >= limit:
                    raise BadHttp(400, f'no end of line within {limit} bytes')
                if self._state == 'trailer':
                    self.stream.widen(MAX_HEAD)
                break
            self._state = self._after(line)
            self.finished = self._state == 'end'
        self.taken += size
        self.busy = steps == STEPS_TOGETHER
        return b''.join(pieces)

    def _after(self, line: bytes) -> str:
        """Return the state after LINE."""
        if self._state == 'size':
            match = _CHUNK_LINE.fullmatch(line)
            if not match:
                raise BadHttp(400, 'a malformed chunk size')
            self.left = int(match.group(1), 16)
            return 'data' if self.left else 'trailer'
        if self._state == 'data end':
            if line != b'\r\n':
                raise BadHttp(400, 'a chunk longer than its size')
            return 'size'
        if line == b'\r\n':
            self.trailers = NO_TRAILER.sub(b'', self.trailers)
            return 'end'
        if not _FIELDS.fullmatch(line):
            raise BadHttp(400, 'a malformed trailer')
        self.trailers += line
        if len(self.trailers) > MAX_HEAD or self.trailers.count(b'\n') > OUTER_FIELDS:
            raise BadHttp(431, f'trailers of more than {MAX_HEAD} bytes or {OUTER_FIELDS} fields')
        return 'trailer'

    def stream_ended(self) -> None:
        raise Incomplete('the last chunk is missing')


class WholeBody(Body):
    """A small body that came with its head, or none at all: nothing is taken from it."""
    __slots__ = ('whole',)
    whole: bytes
    finished = True
    left = 0

    def __init__(self, whole: bytes) -> None:
        self.whole, self.taken = whole, len(whole)


NO_BODY = WholeBody(b'')


def body_reader(stream: ByteStream, length: int) -> Body:
    """Return the reader for a body of LENGTH (bytes, CHUNKED or UNTIL_CLOSE) from STREAM.

    A small one that is all here is taken at once.
    """
    if not length:
        return NO_BODY
    if length < 0:
        return ChunkedBody(stream) if length == CHUNKED else Body(stream, NEVER)
    if length > SMALL_BODY or length > stream.unread:
        return Body(stream, length)
    whole = stream.read_nowait(length)
    while len(whole) < length:
        whole += stream.read_nowait(length - len(whole))
    return WholeBody(whole)


async def read_whole(body: Body, most: int) -> bytes:
    """Return all of BODY, or more than MOST bytes of it.  Raises LocaltunnelError."""
    whole = bytearray(body.whole or b'')
    while not body.finished and len(whole) <= most:
        piece = body.take()
        whole += piece
        if not (piece or body.finished or await body.stream.wait_for_data()):
            body.stream_ended()
    return bytes(whole)


def check_partial_head(data: bytes, seen: int, limit: int) -> None:
    """Refuse early what can never become a head; SEEN bytes of DATA were checked before."""
    if data[:2] == b'\r\n':        # see parse_request
        data, seen = data[2:] or b'\r', max(0, seen - 2)
    line_end = data.find(b'\n', 0, MAX_LINE)
    if len(data) >= limit or (line_end < 0 and len(data) >= MAX_LINE):
        raise (BadHttp(414, f'a request line of more than {MAX_LINE} bytes') if line_end < 0 else
               BadHttp(431, f'a message head of more than {limit} bytes'))
    if data[0] in b'\x16\x80':
        raise BadHttp(400, 'this port does not speak TLS: use http')
    if _BARE_LF.search(data, max(0, seen - 1)) or (data[0] <= 32 and data != b'\r'):
        raise BadHttp(400, 'a line that begins with white space, or does not end with CR LF')
    if 0 <= line_end and seen <= line_end and not _FIRST_LINE.match(data):
        parse_request(data[:line_end + 1] + b'\r\n')      # says what is wrong with it


# The thin shell.

def head_here(stream: ByteStream, limit: int, fields: int, start: int = 0) -> bytes | None:
    """The next head of STREAM, if it is all here; START is where its end is looked for.

    It has at most LIMIT bytes.  Raises BadHttp where it has more than these header FIELDS.  Most
    heads are all here: who asks this first, and read_head then, mostly spares a coroutine.
    """
    data = stream.peek()
    at = data.find(b'\r\n\r\n', start, limit)
    if at < 0:
        return None
    if at > 4 * fields and data.count(b'\n', 0, at) > fields:      # each takes 4 bytes at least
        raise BadHttp(431, f'more than {fields} header fields')
    return stream.read_nowait(at + 4)


async def read_head(stream: ByteStream, idle: float, limit: int = OUTER_HEAD,
                    fields: int = OUTER_FIELDS) -> bytes | None:
    """The next head of STREAM with its empty line, or None where the stream ends before it.

    It may begin within IDLE seconds, and has HEAD_TIMEOUT from its first byte on, LIMIT bytes, and
    header FIELDS.  Raises BadHttp, Overdue, Incomplete, or what broke the stream.
    """
    if not stream.unread and not await stream.wait_for_data(idle):
        return None
    seen, deadline, head = 0, NEVER, head_here(stream, limit, fields)
    while head is None:
        data = stream.peek()
        check_partial_head(data, seen, limit)
        if not seen:
            stream.widen(limit)
            deadline = stream.runtime.now() + HEAD_TIMEOUT
        seen = len(data)
        if not await stream.wait_for_data(max(0.0, deadline - stream.runtime.now())):
            if b'\r\n'.startswith(data):       # an empty line, or the part of it that is here
                return None
            raise Incomplete('the connection ended inside a message head')
        head = head_here(stream, limit, fields, max(0, seen - 3))
    return head


async def read_final(source: ByteStream, sink: ByteStream | None, timeout: float,
                     inside: bool = False) -> Response:
    """The final response head of SOURCE, which may begin within TIMEOUT; 1xx heads go to SINK.

    INSIDE a tunnel it may be larger, since the other end has added to it.  Raises what read_head
    raises, and Incomplete where SOURCE ends without an answer.
    """
    limit, fields = (RESPONSE_HEAD, RESPONSE_FIELDS) if inside else (RESPONSE_HEAD - KIB,
                                                                     RESPONSE_FIELDS - 16)
    for _ in range(MAX_INTERIM + inside):       # inside: what the other end says of too many
        head = None
        if source.unread or await source.wait_for_data(timeout):
            head = (head_here(source, limit, fields)
                    or await read_head(source, timeout, limit, fields))
        if head is None:
            raise Incomplete('the connection ended without a response')
        try:
            response = parse_response(head)
        except BadHttp as e:
            e.head = head
            raise
        if response.status >= 200 or response.status == 101:
            return response
        if sink is not None:
            await sink.write(encode_response(response, response.onward(NOT_OF_INTERIM)))
        if source.unread:
            await asyncio.sleep(0)
    raise BadHttp(502, f'more than {MAX_INTERIM} interim responses')


async def copy_message(head: bytes, body: Body, sink: ByteStream, chunked: bool, end: bool,
                       taps: Iterable[Tap] = ()) -> None:
    """Write HEAD and then BODY to SINK, as it arrives; what is here already leaves in one write.

    CHUNKED: so it is framed there.  END: nothing follows it there.  TAPS are shown the body.
    Raises Incomplete, BadHttp, and what breaks either stream.
    """
    out, size = [head], len(head)
    while not body.finished:
        try:
            piece = body.take()
        except BadHttp as e:
            e.early = out[:1] == [head]
            raise
        if piece:
            for tap in taps:
                tap(piece)
            out += [b'%x\r\n' % len(piece), piece, b'\r\n'] if chunked else [piece]
            size += len(piece)
            if size < MAX_PAYLOAD and not body.busy:
                continue
        if size:
            data, out, size = b''.join(out), [], 0
            del piece
            await sink.write(data)      # it may take long, and no more than this is held meanwhile
            if body.busy:
                await asyncio.sleep(0)
        elif not (body.finished or await body.stream.wait_for_data()):
            body.stream_ended()
    if chunked:
        out += [b'0\r\n', body.trailers, b'\r\n']
    if out or end:
        await sink.write(b''.join(out), end)


# ------------------------------------------------------------------------------------------------
# 7. Names
#
# How names come about, how secrets are compared, and how hosts are written.  Knows no sockets, no
# files and no clocks.
#
# A derived name comes from a proof, which only the user's key can make and any server can check
# without a record: nobody else can ever get it.  An attacker may try any key and label, so length
# alone protects it: with 112 bits, hitting one of 10,000 known names takes 2**98 hashes.  A slower
# hash would add a few bits, and cost a server most when all its clients come back at once.  Older
# keys (without LONG_NAMES in front) keep their names of 72 bits for ever.
# ------------------------------------------------------------------------------------------------

ADJECTIVES = tuple("""able amber apt azure bold brave breezy bright brisk calm clear clever cool
coral cosy crisp dapper deft eager early easy fair fancy fond fresh gentle glad golden grand green
happy hardy honest jolly keen kind light lively lucky mellow merry mild neat nimble noble open plain
polite proud quick quiet rapid ready royal sage silver smart snug solid sunny swift tidy warm
wise""".split())
ANIMALS = tuple("""badger bat bear beaver bee bison boar camel cat cod crab crane crow deer dove
duck eagle eel elk falcon ferret finch fox frog goat goose hare hawk heron horse ibis jay koala lark
lemur lion llama lynx mole moose moth mouse mule newt orca otter owl panda pony puma quail rabbit
raven robin seal shrew sloth snail stork swan tiger toad trout wren""".split())

DERIVED = re.compile(f'(?:{"|".join(ADJECTIVES)})-(?:{"|".join(ANIMALS)})-[a-z2-7]{{12}}'
                     '(?:[a-z2-7]{8})?')
LONG_NAMES = b'lt-key2\0'       # a key of 32 bytes that begins so has names of 20 digits


def make_proof(key: bytes, site: str, kind: str, label: str) -> bytes:
    """Return 32 bytes that prove to SITE that the owner of KEY asks; useless elsewhere.

    KIND is of the tunnel, http or tcp; LABEL is `=` with a chosen name or port, else of a Target.
    """
    message = '\0'.join(('localtunnel/1', site, kind, label)).encode()
    return hmac.new(key, message, hashlib.sha256).digest()


def derive_name(site: str, proof: bytes, long: bool = False) -> str:
    """The name that belongs to PROOF at SITE: two words of 6 bits and 12 digits of 5, LONG 20."""
    digest = hashlib.sha256(b'localtunnel/1 name\0' + site.encode() + b'\0' + proof).digest()
    digits = base64.b32encode(digest[2:17])[:20 if long else 12].decode().lower()
    return f'{ADJECTIVES[digest[0] % 64]}-{ANIMALS[digest[1] % 64]}-{digits}'


def is_derived(name: str) -> bool:
    """Return True if NAME has the form that only derive_name makes."""
    return DERIVED.fullmatch(name) is not None


def digest_of(secret: str | bytes) -> str:
    """The SHA256 in hexadecimal, by which secrets are kept and certificates compared (--pin)."""
    data = secret.encode(errors='replace') if isinstance(secret, str) else secret
    return hashlib.sha256(data).hexdigest()


def same(one: str, other: str) -> bool:
    """Return True if both are equal, in a time that does not show where they differ."""
    return hmac.compare_digest(one.encode(errors='replace'), other.encode(errors='replace'))


def bracketed(host: str) -> str:
    """Return HOST as written in a URL."""
    return f'[{host}]' if ':' in host else host


USUAL_PORTS = {'http': 80, 'https': 443}


def authority(scheme: str, host: str, port: int) -> str:
    """Return HOST:PORT as in a URL, or HOST if the port is the usual one."""
    usual = USUAL_PORTS.get(scheme)
    return bracketed(host) if port == usual else f'{bracketed(host)}:{port}'


def is_address(host: str) -> bool:
    """Return True if HOST, as written in a URL, is an IP address."""
    try:
        ipaddress.ip_address(host.strip('[]'))
    except ValueError:
        return False
    return '%' not in host       # a zone may hold any character


# ------------------------------------------------------------------------------------------------
# 8. Exchange
#
# One request and its response, the same at both ends of a tunnel.  Knows no tunnels, no connections
# to apps, and no observers.
#
#            near                   far
#   server   visitor's connection   stream
#   client   stream                 app's connection
# ------------------------------------------------------------------------------------------------

class Record:
    """What observers are told of.  As it is, a stream that ended before its request."""
    __slots__ = ('number', 'visitor', 'method', 'target', 'status', 'why', 'began', 'answered')
    host = ''                           # whom the request is for
    sent = size = 0                     # bytes of the body of the request, and of the response
    facts = UNSERVED                    # at a server: whose client serves it

    def __init__(self, number: int, began: float, method: str = '?', target: str = '?') -> None:
        self.number, self.began = number, began
        self.method, self.target = method, target
        self.visitor = ''               # whose address it is
        self.status = 0                 # of the response, once that has begun
        self.why = ''                   # what went wrong
        self.answered = 0.0             # when the app's response came; 0 until it has

    def __repr__(self) -> str:
        return f'<#{self.number} {self.method} {self.target} {self.status} {self.why}>'


class Count:
    """Counts bytes that are not read from a body."""

    def __init__(self, taken: int = 0) -> None:
        self.taken = taken

    def add(self, data: bytes) -> None:
        """Note that DATA passed."""
        self.taken += len(data)


Watch = Callable[['Exchange'], Optional[Tap]]       # returns what is to be shown what passes


class Exchange(Record):
    """One request and its response."""
    __slots__ = ('near', 'far', 'request', 'body', 'response', 'answer', 'keep', 'fault', 'sending')

    def __init__(self, near: ByteStream, request: Request, began: float, number: int = 0,
                 visitor: str = '') -> None:
        """REQUEST came on NEAR, from VISITOR's address.  Raises BadHttp for a malformed length."""
        # What Record sets, too: to call that for each request costs more than these lines.
        self.number, self.visitor, self.began = number, visitor, began
        self.target = request.target.decode('latin-1')
        self.status, self.why, self.answered = 0, '', 0.0
        self.near, self.far = near, near        # `far` is known once the request goes on
        self.request, self.body = request, body_reader(near, request.length)
        # Of what the visitor gets, the body, or the count of its bytes; None until it begins.
        self.answer: Body | Count | None = None
        self.response: Response | None = None   # of the app, once it is passed on
        self.keep = False           # True if the socket at this end may carry another request
        self.fault: BadHttp | None = None       # what is malformed in the body of the request
        self.sending: asyncio.Task[None] | None = None      # while the request is streamed

    @property
    def method(self) -> str:        # type: ignore[override]
        return self.request.method.decode()

    @property
    def host(self) -> str:          # type: ignore[override]
        return self.request.host_name

    @property
    def facts(self) -> Facts:       # type: ignore[override]
        return self.far.facts

    @property
    def sent(self) -> int:          # type: ignore[override]
        return self.body.taken

    @property
    def size(self) -> int:          # type: ignore[override]
        return self.answer.taken if self.answer else 0

    @property
    def repeatable(self) -> bool:
        """True if the request may be sent again while no response has begun."""
        return self.body.whole is not None and self.request.method in IDEMPOTENT

    def send(self, far: ByteStream, block: bytes, end: bool,
             taps: Iterable[Tap] = ()) -> Awaitable[None]:
        """Pass the request on to FAR, with the header lines in BLOCK.  With END nothing follows.

        Await the result; what has to be streamed goes on meanwhile, and is shown to TAPS.
        """
        self.far = far
        head = encode_request(self.request, block, type(self.body) is ChunkedBody)
        whole = self.body.whole
        if whole is not None:
            return far.write(head + whole, end)
        self.sending = self.near.runtime.spawn(self._stream_body(head, end, taps))
        return asyncio.sleep(0)

    async def _stream_body(self, head: bytes, end: bool, taps: Iterable[Tap]) -> None:
        far = self.far
        if isinstance(self.near, Connection):       # a visitor's: only this end sees who is slow
            self.near.timeout, taps = HEAD_TIMEOUT, [self._goes_on, *taps]
        try:
            await copy_message(head, self.body, far, type(self.body) is ChunkedBody, end, taps)
        except (LocaltunnelError, OSError) as e:
            if isinstance(e, Overdue):
                e = BadHttp(408, 'the body of the request did not arrive in time')
            self.fault = e if isinstance(e, BadHttp) else None
            if far.error is None:       # cut short here, cut short there
                far.reset(INCOMPLETE if self.fault else CANCELLED, f'the request broke off: {e}')

    def _goes_on(self, piece: bytes) -> None:
        """Note that a PIECE of the body is there: the next one may take longer."""
        if not self.status:
            self.near.timeout = UPLOAD_IDLE

    def respond(self, response: Response, length: int, block: bytes, end: bool,
                watch: Iterable[Watch] = (), near_taps: Iterable[Tap] = ()) -> Awaitable[None]:
        """Pass RESPONSE back with the header lines in BLOCK, and its body of LENGTH.

        Await the result.  With END nothing follows.  What WATCH returns is shown the body, unless
        it is whole, or what comes after an upgrade, of which NEAR_TAPS are shown the other way.
        """
        self.answered, self.response = self.near.runtime.now(), response
        if response.status == 101:
            return self._upgrade(response, block, self.taps(watch), near_taps)
        self.status = response.status
        self.answer = body = body_reader(self.far, length)
        chunked = length < 0 and not self.request.old
        head, whole = encode_response(response, block, chunked), body.whole
        if whole is None:
            return copy_message(head, body, self.near, chunked, end, self.taps(watch))
        return self.near.write(head + whole, end)

    def taps(self, watch: Iterable[Watch]) -> list[Tap]:
        """Return what WATCH wants to be shown what passes."""
        return [*filter(None, [ask(self) for ask in watch])]

    async def _upgrade(self, response: Response, block: bytes, taps: Iterable[Tap],
                       near_taps: Iterable[Tap]) -> None:
        check_upgrade(self.request, response)
        if self.sending:            # two readers of one stream are one too many
            lost = self.near.runtime.spawn(self.far.until_broken())
            try:
                await asyncio.wait({self.sending, lost}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await end_task(lost)
            self.far.check()
        self.status = 101
        await self.near.write(encode_response(response, block))
        self.answer = count = Count()
        await join(self.near, self.far, near_taps, [count.add, *taps])

    async def stop_sending(self) -> None:
        """Send no more of the request."""
        if self.sending:
            await end_task(self.sending)
            self.sending = None


# ------------------------------------------------------------------------------------------------
# 9. Tunnels
#
# Who serves which name, and which visitors may come to it.  Checks no tokens, and does not know
# what a request asks for.
# ------------------------------------------------------------------------------------------------

class Visitor:
    """One visitor's connection, and the exchange that runs on it.  A client, too, comes as one."""
    __slots__ = ('connection', 'peer', 'address', 'scheme', 'host', 'x_forwarded', 'front',
                 'refusal', 'stream', 'exchange', 'waiting')

    def __init__(self, connection: Connection, front: Front | None = None) -> None:
        self.connection = connection
        self.peer = self.address = connection.peer      # the second may be what a front says
        self.scheme = (front and front.scheme) or ('https' if connection.secure else 'http')
        self.host = b''             # what was the visitor's Host, if somebody in front says so
        self.front = front if front and front.vouches(self.peer) else None      # who speaks for it
        self.refusal: HopFailed | None = None   # a seam: what it gets where there is no room
        self.came_by([self.peer])
        self.stream: Stream | None = None               # by which it is served now
        self.exchange: Exchange | None = None           # the one that runs; none for raw TCP
        self.waiting: asyncio.Future[None] | None = None        # a seam: cancelled when it goes
        connection.on_lost, connection.on_eof = self._gone, self._half_closed

    def came_by(self, chain: Sequence[str]) -> None:
        """Have apps told that the visitor came by way of the addresses in CHAIN."""
        self.x_forwarded = (f'X-Forwarded-For: {", ".join(chain)}\r\n'
                            f'X-Forwarded-Proto: {self.scheme}\r\n').encode()

    def url_of(self, name: str, host: bytes) -> str:
        """The URL of the host NAME, with the scheme and port by which HOST here was reached."""
        port = host.rpartition(b':')[2]
        return f'{self.scheme}://' + (authority(self.scheme, name, int(port)) if port.isdigit()
                                      else name)

    @property
    def idle(self) -> bool:
        """True if nothing is under way for this visitor."""
        return self.stream is None and self.waiting is None

    def begin(self, stream: Stream) -> None:
        """Begin an exchange on STREAM."""
        self.stream, stream.visitor = stream, self
        if self.connection.error is not None:       # it had more to ask, or waited for a client
            self._gone()
        elif self.connection.eof:
            self._half_closed()

    def _gone(self) -> None:
        if self.waiting and not self.waiting.done():
            self.waiting.cancel()
        if self.stream:
            self.stream.reset(CANCELLED, 'the visitor went away')

    def _half_closed(self) -> None:
        if not self.idle:
            self.connection.runtime.loop.call_later(
                HALF_CLOSED, self._waited_enough, self.stream, self._taken())

    def _taken(self) -> int:
        return self.exchange.size if self.exchange else 0

    def _waited_enough(self, stream: Stream | None, taken: int) -> None:
        raw = self.exchange is None or self.exchange.status == 101      # TCP, or upgraded
        if stream is not self.stream or (stream and raw):
            return      # the exchange is over, or this is only a half close
        if self._taken() == taken and not self.connection.writing_paused:
            self._gone()
        else:
            self._half_closed()


# Decides whether a visitor may come to the tunnel of a key, by one client: takes the header lines
# of the request (none for raw TCP) and returns them as they go on, or raises HopFailed.
Gate = Callable[[str, Visitor, bytes], bytes]

MAX_NAME, MAX_VERSION = 63, 20      # characters of what a client says, as a log has it


class Hello:
    """What a client says of itself, checked; one that goes on says it again, with `resume`.

    kind, name, port    what it asks for; without a name the one that its proof gives
    proof, long         of its user's key, see make_proof; True if names have 20 digits
    instance, attempt   of this process, at random; how many times it has asked
    started             when it was, by its clock: of two that exclude each other the later stays
    share, release      True if others may serve beside it; if it gives the name back
    rules, gates        who may visit by it, as said; and what sees to that
    wants               what else it would like, see Limits
    lease               of the name, as another server signed it
    resume              the session to go on with, and the bytes that it has received of that
    version             of its program, as a word for logs
    """
    __slots__ = ('kind', 'name', 'proof', 'long', 'instance', 'started', 'share', 'port', 'release',
                 'rules', 'gates', 'wants', 'lease', 'resume', 'attempt', 'version')

    def __init__(self, text: bytes, gates_of: Callable[[Mapping[str, Any]], list[Gate]]) -> None:
        """Raises Refused."""
        try:
            hello = json.loads(text)
            self.kind, self.name = str(hello['kind']), hello.get('name')
            self.proof = bytes.fromhex(hello['proof'])
            self.instance, self.started = bytes.fromhex(hello['instance']), float(hello['started'])
            self.share = bool(hello.get('share'))
            self.release = bool(hello.get('release')) and self.name is not None
            self.long = bool(hello.get('long'))
            self.port, self.attempt = int(hello.get('port') or 0), int(hello.get('attempt') or 0)
            self.rules = {word: hello[word] for word in ('allow', 'auth')
                          if hello.get(word, []) != []}         # what else is empty is malformed
            self.gates = gates_of(self.rules)
            self.wants = dict(hello.get('wants', {}))
            self.lease = str(hello.get('lease', ''))
            self.version = re.sub('[^A-Za-z0-9.+-]', '?',
                                  str(hello.get('version', ''))[:MAX_VERSION])
            resume = hello.get('resume') or {'session': '', 'received': 0}      # no session
            self.resume = str(resume['session']), int(resume['received'])
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError,
                RecursionError) as e:
            raise Refused(400, 'bad_hello', 'Localtunnel-Hello is malformed or incomplete') from e
        if self.name is not None:
            self.name = str(self.name).lower()
        if (self.kind not in ('http', 'tcp') or len(self.proof) != 32 or len(self.instance) != 16
                or not abs(self.started) < 1e15):       # NaN and infinity would win for ever
            raise Refused(400, 'bad_hello', 'Localtunnel-Hello has a bad kind, proof, instance or '
                          'time of start')


class Member:
    """One session of a tunnel, and whose it is."""
    __slots__ = ('session', 'hello', 'grant', 'holder')

    def __init__(self, session: Session, hello: Hello, grant: Grant, holder: str) -> None:
        """HOLDER is whom it is counted for, see Limits."""
        self.session, self.hello, self.grant, self.holder = session, hello, grant, holder

    def load(self) -> tuple[bool, int]:
        """How busy it is, to be compared; one that owes a PONG may have fallen asleep."""
        return self.session.liveness.asked_at != NEVER, len(self.session.streams)


class Tunnel:
    """One name, and the clients that serve it, or that did a while ago."""
    __slots__ = ('name', 'kind', 'key', 'url', 'user', 'members', 'since', 'left_at', 'ended',
                 'allowance')

    def __init__(self, name: str, kind: str) -> None:
        self.name, self.kind = name, kind       # one proof may have a tunnel of each kind
        self.key = name if kind == 'http' else f'{kind}:{name}'
        self.url = ''                   # '' until a client serves it; and for TCP without a port
        self.user = ''                  # of the last client's token
        self.members: list[Member] = []         # none: its client is away
        self.since = -NEVER             # when the first of its members came
        self.left_at = -NEVER           # when the last one went, or lost its connection
        self.ended = ''                 # why, where it went on purpose: nobody waits for it
        self.allowance = (0.0, 0.0)     # see Limits: requests that may come at once, since when

    def pick(self) -> Member | None:
        """Return the member for the next request: the least busy one that is there, or None."""
        picked = None
        for member in self.members:
            if member.session.usable and (picked is None or member.load() < picked.load()):
                picked = member
        return picked

    def replaced_by(self, new: Hello) -> list[Member]:
        """Return the members that go where NEW comes: they can't serve beside it."""
        return [old for old in self.members if old.hello.instance == new.instance or not (
            old.hello.share and new.share
            and (old.hello.rules, old.hello.wants) == (new.rules, new.wants))]

    def ahead_of(self, new: Hello) -> list[Member]:
        """Return those of them that NEW may not replace: they are there, and were started later."""
        return [old for old in self.replaced_by(new) if old.hello.started > new.started
                and old.hello.instance != new.instance and old.session.connection is not None]


def audit(log: Observer, event: str, facts: Facts, url: str = '', reason: str = '') -> None:
    """Log what became of a client, or of its wish; FACTS say whose it is."""
    log.note(f'tunnel {event.replace("_", " ")}', event=event, url=url, **facts, reason=reason)


def no_tunnel(why: str) -> HopFailed:
    """The answer for a name that nobody has; WHY says so in words."""
    return HopFailed(404, why, cure='start the client, and compare the URL that it prints with '
                     'this one')


class Waits:
    """The requests that can't be served now; here they don't wait, and are told so at once."""

    def __init__(self, tunnels: Tunnels) -> None:
        self.tunnels = tunnels
        self.of: dict[str, set[asyncio.Future[None]]] = {}      # by the key of the tunnel

    async def for_stream(self, key: str, visitor: Visitor,
                         lines: bytes = b'') -> tuple[Stream, bytes]:
        """What `open_stream` returns, once it does.  Raises HopFailed."""
        raise self.tunnels.away(key)

    def wake(self, *keys: str) -> None:
        """Wake those that wait for one of KEYS, or all."""


# What a server is at.  SERVING until it ends; or HANDING_OVER, while a successor starts, and after
# that SERVING again if it does not; LEAVING, while balancers learn that they send nobody here.
#
#   state          new clients    visitors' connections    who waits for a client
#   SERVING        come           stay                     waits
#   HANDING_OVER   are refused    stay                     waits
#   LEAVING        come           end with a response      waits
#   ENDING         are refused    end with a response      is told that nobody comes
SERVING, HANDING_OVER, LEAVING, ENDING = range(4)


class Tunnels:
    """Who serves which name.

    A tunnel is here from its first client on, until REMEMBERED seconds after its last one went.
    """

    def __init__(self, runtime: Runtime, hold: float, log: Observer) -> None:
        """Requests wait HOLD seconds for a client on its way back."""
        self.hold, self.log, self._runtime = hold, log, runtime
        self.state = SERVING            # of the server
        self.served: dict[str, int] = collections.Counter()     # sessions of each holder
        self._table: dict[str, Tunnel] = {}     # by key
        self._started = runtime.now()
        self._look_at = 0.0             # when all tunnels are looked at again
        # Seams.
        self.only: OnlyOne | None = None        # there is a place for one http tunnel
        self.waits = Waits(self)                # what requests do that can't be served now
        self.bars: Bars | None = None           # whom the operator keeps out, while that is anybody
        self.detours: dict[str, Detour] = {}    # who has the requests of a tunnel, by key
        self.others: Others | None = None       # other servers behind one balancer
        self.on_forget: list[Callable[[Tunnel], object]] = []       # told of tunnels that go
        # Told of each member that comes, and again once its session is OVER.
        self.watchers: list[Callable[[Tunnel, Member], None]] = []
        runtime.swept.add(self)

    def __iter__(self) -> Iterator[Tunnel]:
        return iter(tuple(self._table.values()))

    def get(self, key: str) -> Tunnel | None:
        """The tunnel of KEY, even if its client is away; None if there is none."""
        return self._table.get(key)

    def members(self) -> list[Member]:
        """All sessions."""
        return [member for tunnel in self._table.values() for member in tunnel.members]

    @property
    def starting(self) -> bool:
        """True while clients may be on their way back to a server that was restarted."""
        return self._runtime.now() - self._started < self.hold

    # Clients come and go.

    def enter(self, tunnel: Tunnel, member: Member) -> None:
        """MEMBER serves TUNNEL from now on."""
        self._table[tunnel.key] = tunnel
        tunnel.user = member.grant.user
        self.served[member.holder] += 1
        if not tunnel.members:
            tunnel.since = self._runtime.now()
        tunnel.members.append(member)
        for tell in self.watchers:
            tell(tunnel, member)
        member.session.on_change = functools.partial(self._changed, tunnel, member)

    def _changed(self, tunnel: Tunnel, member: Member) -> None:
        """MEMBER lost its connection, was told of a GOAWAY, or is OVER."""
        session = member.session
        over = session.state == OVER
        for tell in self.watchers if over else ():
            tell(tunnel, member)
        if member not in tunnel.members:
            return          # it was replaced, or revoked
        if over:
            self.remove(tunnel, member)
            audit(self.log, 'closed', session.facts, tunnel.url,
                  session.goaway[1] if session.goaway else
                  'the server is shutting down' if self.state == ENDING else str(session.error))
        goodbye = session.goaway is not None and all(
            other.session.goaway is not None for other in tunnel.members)
        tunnel.ended = f'the client of {tunnel.key} was stopped' if goodbye else ''
        tunnel.left_at = self._runtime.now()

    def remove(self, tunnel: Tunnel, member: Member) -> None:
        """MEMBER does not serve TUNNEL any more."""
        tunnel.members.remove(member)
        self.served[member.holder] -= 1
        if not self.served[member.holder]:
            del self.served[member.holder]

    def revoke(self, tunnel: Tunnel, member: Member, why: str) -> None:
        """End MEMBER, which may not come back."""
        self.remove(tunnel, member)
        tunnel.ended = why.partition(';')[0]    # what helps is for its owner, not for visitors
        tunnel.left_at = self._runtime.now()
        member.session.leave(REVOKED, why, within=LINGER)
        audit(self.log, 'ended', member.session.facts, tunnel.url, why)

    def end(self, name: str, why: str) -> bool:
        """End all that serves NAME, of any kind; return whether anything did."""
        found = [(t, member) for t in self if t.name == name for member in t.members]
        for tunnel, member in found:
            self.revoke(tunnel, member, why)
        return bool(found)

    def sweep(self, now: float, woke_up: bool) -> None:
        """Forget who went long ago; now and then, since there may be thousands of tunnels."""
        if now < self._look_at:
            return
        self._look_at = now + 4 * SWEEP
        away = [t for t in self if not t.members and t.key not in self.waits.of]
        away.sort(key=lambda tunnel: -tunnel.left_at)
        for rank, tunnel in enumerate(away):
            if rank >= MAX_AWAY or now - tunnel.left_at > REMEMBERED:
                del self._table[tunnel.key]
                for forget in self.on_forget:
                    forget(tunnel)

    # Requests go through them.

    def open_stream(self, key: str, visitor: Visitor,
                    lines: bytes = b'') -> tuple[Stream, bytes] | None:
        """A stream to the member that will serve VISITOR, and LINES as its gates let them pass.

        They are asked here and nowhere else, at the last moment: each member, and each that comes
        while a request waits, may have others.  None if no member has room now.  Raises HopFailed.
        """
        tunnel = self._table.get(key)
        member = tunnel.pick() if tunnel else None
        if member is None:
            return None
        for gate in member.hello.gates:
            lines = gate(key, visitor, lines)
        stream = member.session.open_stream()
        return (stream, lines) if stream else None

    def away(self, key: str) -> HopFailed:
        """Why nobody serves KEY, which is known."""
        tunnel = self._table.get(key)
        if self.state == ENDING:
            why, cure = 'the server is shutting down; try again soon', ''
        elif tunnel is None:
            why, cure = f'the client of {key} is not connected', 'start it'
        elif tunnel.ended:
            why, cure = tunnel.ended, 'start the client again; it says why if it may not'
        else:
            why, cure = f'the client of {key} is away; try again soon', (
                'it comes back by itself when its machine is awake and online; if it has ended, '
                'start it again')
        return HopFailed(503, why, f'Retry-After: {RETRY_AFTER}', cure=cure,
                         hop='relay' if self.state == ENDING else 'client')

    def connected(self, tunnel: Tunnel) -> None:
        """A client of TUNNEL has a connection: requests that wait for it go on."""
        tunnel.ended = ''
        self.waits.wake(tunnel.key)

    def close(self) -> None:
        """Expect nobody back: send clients elsewhere, and wake what waits for one."""
        for member in self.members():
            member.session.drain(DRAINING, 'the server is shutting down')
            if member.session.connection is None:       # and it can't come back
                member.session.end(Disconnected('the server is shutting down'))
        self.waits.wake()

    async def end_all(self) -> None:
        """Say goodbye to all clients, and end what is left of their sessions a moment later."""
        for member in self.members():
            member.session.leave(DRAINING, 'the server is shutting down')
        await look_until(lambda: not self.members(), LINGER)
        for member in self.members():
            member.session.end(Disconnected('the server has shut down'))


# ------------------------------------------------------------------------------------------------
# 10. Admission
#
# Who may open a tunnel, and under which name.  Limits look at the token, slow down who guesses one,
# and say how much the client may have.  Knows no routes and no requests of visitors.
#
#   grant     what a token allows; its `digest` is '' for a client without a token
#   owner     whom a chosen name belongs to: the token's user if it has one, else the proof
#   lease     of a chosen name: the first who comes for it is its owner, and all others are refused
#
# First all that may speak against a client is looked at, and nothing changes; then the lease is
# written, the last that can fail; then the client enters.  The disk may take its time, so clients
# take turns; a session that goes on needs none.
# ------------------------------------------------------------------------------------------------

class Candidate:
    """A client that asks for a tunnel."""
    __slots__ = ('visitor', 'grant', 'hello', 'prover', 'owner', 'name', 'tunnel', 'facts')

    def __init__(self, visitor: Visitor, grant: Grant, hello: Hello, name: str,
                 facts: Facts) -> None:
        self.visitor, self.grant, self.hello, self.name = visitor, grant, hello, name
        self.facts = facts
        self.prover = f'proof:{digest_of(hello.proof)}'     # an owner without a user
        self.owner = f'user:{grant.user}' if grant.user else self.prover
        self.tunnel = Tunnel(name, hello.kind)  # until it is known that there is one already


# A client that was let in; True if it goes on with the session that it had.
Admitted = Tuple[Member, Tunnel, bool]


class Admission:
    """Lets clients in, or says why not."""

    def __init__(self, runtime: Runtime, leases: Leases, tunnels: Tunnels, budget: Budget,
                 limits: Limits, trace: Trace | None) -> None:
        """BUDGET is of all sessions together."""
        self.tokens, self.leases, self.limits, self.budget = leases.tokens, leases, limits, budget
        self._runtime, self._tunnels, self._trace = runtime, tunnels, trace
        self.turn = asyncio.Lock()              # for who changes what others have looked at
        # Seams.
        self.kinds: dict[str, Kind] = {}        # beside http, as a hello calls them
        self.checks: list[Callable[[Candidate], None]] = []     # each may raise Refused
        self.session: type[Session] = Session   # what a new one is, and
        self.window: type[ReceiveWindow] = ReceiveWindow        # the windows of its streams
        # Lets one back to the session that it had; None for all others.
        self.returning: Callable[[Candidate], Admitted | None] = lambda asked: None
        leases.in_use = self._in_use
        tunnels.watchers.append(lambda tunnel, _: leases.renew(tunnel.name, time.time()))

    def _in_use(self, name: str) -> bool:
        """Return True if somebody serves NAME, by a tunnel of any kind."""
        tunnels = map(self._tunnels.get, (name, *(f'{kind}:{name}' for kind in self.kinds)))
        return any(tunnel.members for tunnel in tunnels if tunnel)

    async def admit(self, visitor: Visitor, request: Request, facts: Facts,
                    url: Callable[[str], str]) -> Admitted | None:
        """What a session request becomes; None for one that gave its name back.

        FACTS are filled in as they become known.  URL gives that of a name.  Raises Refused.
        """
        asked = await self._candidate(visitor, request, facts)
        goes_on = self.returning(asked)
        if goes_on:
            return goes_on
        async with self.turn:      # one after the other: what was looked at stays so
            asked.visitor.connection.check()
            asked.tunnel = self._find(asked)
            goes_on = self.returning(asked)      # an attempt before this one came in meanwhile
            if goes_on:
                return goes_on
            self._check_new(asked)
            await self._lease(asked)
            if asked.hello.release:
                self._tunnels.end(asked.name, f'the name {asked.name} was given back')
                return None
            return await self._enter(asked, url)

    async def _candidate(self, visitor: Visitor, request: Request, facts: Facts) -> Candidate:
        """Who asks, and for what.  Raises Refused."""
        try:
            hello = Hello(request.get(b'localtunnel-hello'), self.limits.gates_of)
            first, _, parent = request.host_name.partition('.')     # by NAME.SITE, or by address
            site = parent if is_derived(first) else request.host_name.strip('[]')
            name = derive_name(site, hello.proof, hello.long) if hello.name is None else hello.name
            facts.update(name=printable(name[:MAX_NAME]), version=hello.version)
        finally:        # before the token is right, nothing of it matters, but for the log
            grant = await self.limits.grant(self.tokens, visitor, request)
        facts['user'] = grant.user
        if hello.name is not None:
            self.limits.check_name(name, grant)
        asked = Candidate(visitor, grant, hello, name, facts)
        if self._owner(asked) == asked.owner:
            there = self._find(asked).ahead_of(hello)     # one that does not answer goes
            await asyncio.gather(*(old.session.must_answer(ANSWER_WITHIN) for old in there))
            visitor.connection.check()      # it may be gone by now
        asked.tunnel = self._find(asked)
        for check in self.checks:
            check(asked)
        return asked

    def _owner(self, asked: Candidate) -> str | None:
        """Who owns the name that ASKED wants: of a derived one its proof says that it is ASKED."""
        return asked.owner if asked.hello.name is None else (
            self.leases.owner(asked.name, time.time()))

    def _find(self, asked: Candidate) -> Tunnel:
        return self._tunnels.get(asked.tunnel.key) or asked.tunnel

    def check_kind(self, asked: Candidate) -> None:
        """Raises Refused where no tunnel of this kind may lead to ASKED."""
        kind = asked.hello.kind
        if kind in self.kinds:
            self.kinds[kind].check(asked)
        elif kind != 'http':
            raise Refused(403, 'bad_port', f'this server has no tunnels of the kind {kind}')

    def _check_new(self, asked: Candidate) -> None:
        """Raises Refused where the server has no place for ASKED."""
        hello, tunnel = asked.hello, asked.tunnel
        if self._tunnels.state in (HANDING_OVER, ENDING):
            raise Refused(503, 'draining', 'the server is shutting down')
        self.check_kind(asked)
        if hello.release:
            return              # it needs no place
        self.limits.check_place(asked, self._tunnels)
        if tunnel.ahead_of(hello) and self._owner(asked) == asked.owner:
            raise Refused(409, 'superseded', f'a client of yours serves {tunnel.name}, and was '
                          'started later by its clock; end it, or set both clocks right',
                          final=True)

    async def _lease(self, asked: Candidate) -> None:
        """Lease what ASKED wants, or take it back.  Raises Refused and Disconnected."""
        hello, name, others = asked.hello, asked.name, self._tunnels.others
        if others and hello.name is not None:
            await others.bring(hello.lease, name, asked.owner, asked.grant.digest)
        owner = self._owner(asked)
        if hello.release:
            if owner != asked.owner:
                raise Refused(409, 'not_yours', f'the name {name} is not yours to give back')
            await self.leases.save(self.leases.free(name))
            return
        if owner not in (None, asked.owner):
            raise Refused(409, 'name_taken', f'the name {name} is taken; choose another name')
        await self.leases.give(asked, self.limits.notes_of(hello))
        if hello.kind in self.kinds and not asked.tunnel.url:
            await self.kinds[hello.kind].place(asked)

    async def _enter(self, asked: Candidate, url: Callable[[str], str]) -> Admitted:
        """Let ASKED in.  Raises Refused."""
        hello, tunnel = asked.hello, asked.tunnel
        for check in self.checks:       # once more: it has waited for others, and for the disk
            check(asked)
        if hello.kind == 'http':
            tunnel.url = url(asked.name)
        self._make_way(asked)
        session = self.session(self._runtime, self.budget, self._trace, self.window)
        session.facts = asked.facts
        member = Member(session, hello, asked.grant, self.limits.holder(asked))
        self._tunnels.enter(tunnel, member)
        if hello.kind in self.kinds:
            await self.kinds[hello.kind].open(tunnel)
            if session.error:       # meanwhile the operator has ended it, which is for good
                raise Refused(401, 'token', str(session.error), final=True)
        return member, tunnel, False

    def _make_way(self, asked: Candidate) -> None:
        """End the members that ASKED replaces."""
        tunnel, new = asked.tunnel, asked.hello
        for old in tunnel.replaced_by(new):
            self._tunnels.remove(tunnel, old)
            if old.hello.instance == new.instance:
                event, why = 'closed', 'the client came back without this session'
                old.session.end(Disconnected(why))
            else:
                event, why = 'taken_over', f'a client at {asked.visitor.address} was started later'
                old.session.leave(SUPERSEDED, 'a client of yours that was started later took '
                                  f'{tunnel.name} over', within=DRAIN)
            audit(self._tunnels.log, event, old.session.facts, tunnel.url, why)


# ------------------------------------------------------------------------------------------------
# 11. Server
#
# Sessions in, visitors in.  Knows no frames and nothing of the client.
#
# Both arrive on the same port.  The first request of a connection tells them apart: an Upgrade to
# our protocol becomes a session; anything else belongs to a visitor, and each of a visitor's
# requests is routed by its own Host.
# ------------------------------------------------------------------------------------------------

class Visitors:
    """All visitors' connections; here there is room for as many as come."""

    def __init__(self, runtime: Runtime) -> None:
        self.front: Front | None = None         # a seam: who stands in front and brings them
        self.reserved = 0                       # descriptors: sockets of TCP tunnels, files
        self.runtime = runtime
        self.here: dict[Visitor, None] = {}

    def __iter__(self) -> Iterator[Visitor]:
        return iter(tuple(self.here))

    def __len__(self) -> int:
        return len(self.here)

    def enter(self, connection: Connection) -> Visitor:
        """A visitor came on CONNECTION."""
        visitor = Visitor(connection, self.front)
        self.here[visitor] = None
        return visitor

    def active(self, visitor: Visitor) -> None:
        """VISITOR was served, and stays for another request."""

    def leave(self, visitor: Visitor) -> None:
        """Drop VISITOR, whose connection ends."""
        self.here.pop(visitor, None)

    def close_idle(self) -> None:
        """Close the connections on which nothing is under way."""
        for visitor in self:
            if visitor.idle and not visitor.connection.unread:
                visitor.connection.close()


class Server:
    """The public end: visitors come in, and their requests go out through tunnels."""

    def __init__(self, runtime: Runtime, domain: str, log: Observer, *, leases: Leases,
                 limits: Limits, doors: Doors, pages: Pages, onward: Onward, hold: float = HELD,
                 drain: float = DRAIN, budget: int = LEAST_BUDGET,
                 trace: Trace | None = None) -> None:
        """BUDGET is of all sessions, in bytes."""
        self.runtime, self.domain, self.log = runtime, domain.lower(), log
        self.tls: Tls | None = None             # a seam: how TLS is spoken, if at all
        self._port = 0                          # for http; the last one that is listened on
        self.counters: dict[str | int, int] = collections.Counter()    # by status, by event
        self.pages = pages              # what it says itself
        self.doors = doors              # what it listens on
        self.visitors = Visitors(runtime)       # a seam: who may stay
        self.tunnels = Tunnels(runtime, hold, log)
        self.admission = Admission(
            runtime, leases, self.tunnels, Budget(budget), limits, trace)
        self.onward = onward            # header lines, as they go on
        self.drain, self.limits = drain, limits     # drain may change at any time, as tunnels.hold
        runtime.swept.add(self)

    async def listen(self, sock: socket.socket) -> None:
        """Accept visitors and sessions on SOCK, which is bound."""
        self._port = sock.getsockname()[1]
        await self.doors.open(sock, self.serve)

    async def leave(self) -> None:
        """Keep serving while those who send visitors here learn that it is about to end."""
        self.tunnels.state = LEAVING
        for tell in self.doors.before_close:
            await tell()

    async def refuse_clients(self, state: int = ENDING) -> None:
        """Go over to STATE, which refuses clients, and wait for one that is on its way in."""
        self.tunnels.state = state
        async with self.admission.turn:
            pass

    async def stop(self, handed_over: bool = False) -> None:
        """Drain: accept nothing more, send the clients elsewhere, let open exchanges finish.

        With HANDED_OVER a successor accepts, and idle visitors may stay: their next request is
        answered here, with `Connection: close`.
        """
        await self.refuse_clients()
        await self.doors.close(handed_over)
        self.tunnels.close()

        def finished() -> bool:
            if not handed_over:
                self.visitors.close_idle()
            return not (self.visitors or self.doors.busy)
        await look_until(finished, self.drain)
        await self.tunnels.end_all()

    def sweep(self, now: float, woke_up: bool) -> None:
        """Forget what visitors have just sent."""
        forget_heads()

    # One connection.

    async def serve(self, connection: Connection) -> None:
        """Answer the requests of one connection, one after the other."""
        visitor = self.visitors.enter(connection)
        idle, taken = HEAD_TIMEOUT, False
        head: bytes | None = None
        try:
            while True:
                if connection.unread or await connection.wait_for_data(idle):
                    head = (head_here(connection, OUTER_HEAD, OUTER_FIELDS)
                            or await read_head(connection, idle))
                if head is None:
                    break
                request = parse_request(head)
                if visitor.front:
                    visitor.front.look_behind(visitor, request)
                if request.upgrade.startswith(b'localtunnel/') and (
                        request.target == WELL_KNOWN.encode()):
                    taken = await self._begin_session(visitor, request)
                    break
                visitor.exchange = exchange = Exchange(
                    connection, request, self.runtime.now(), visitor=visitor.address)
                try:
                    await self._answer(visitor, exchange)
                except HopFailed as e:
                    exchange.why = str(e)
                    await self.give(visitor, exchange, self.pages.failed(
                        e, request.get(b'accept'), request.method))
                finally:
                    if request.target not in self.pages.everywhere:     # for balancers: they ask
                        self.counters[exchange.status] += 1             # every second or two
                        self.log.exchange(exchange, self.runtime.now() - exchange.began)
                if not exchange.keep:
                    if not exchange.body.finished or connection.unread:
                        await connection.linger(LINGER_MOST)
                    break
                visitor.exchange = head = None
                del exchange        # and the bodies with it: the next request may be long in coming
                self.visitors.active(visitor)
                idle = KEEP_ALIVE
                if connection.unread:     # pipelined
                    await asyncio.sleep(0)
        except (BadHttp, Overdue) as e:
            await self.pages.last_words(connection, e, head)
        except (LocaltunnelError, OSError):
            connection.abort()
        finally:
            self.visitors.leave(visitor)
            if not taken:
                connection.close()

    def _answer(self, visitor: Visitor, exchange: Exchange) -> Awaitable[None]:
        """Return what answers the request, to be awaited; that, too, raises HopFailed."""
        request = exchange.request
        name = '' if request.target in self.pages.everywhere else self._route(visitor, request)
        if name in self.tunnels.detours:
            return self.tunnels.detours[name].take(visitor, exchange, name)
        if name:
            return self.forward(visitor, exchange, name)
        return self.give(visitor, exchange, self.pages.find(request, visitor.scheme))

    async def give(self, visitor: Visitor, exchange: Exchange, own: Own) -> None:
        """Answer the request with OWN, a response of ours."""
        request, exchange.status, exchange.answer = exchange.request, own.status, Count(own.size)
        exchange.keep = (request.keep_alive and exchange.body is NO_BODY and not visitor.refusal
                         and self.tunnels.state < LEAVING)
        await own.write(visitor.connection, *self.onward.of_own(exchange))

    # Routes.

    def _route(self, visitor: Visitor, request: Request) -> str:
        """The name of the tunnel that REQUEST may pass, which is its key; '' for a page of ours.

        Raises HopFailed.
        """
        if visitor.refusal:
            raise visitor.refusal.again()
        host = request.host_name
        name, _, parent = host.partition('.')
        if self.tunnels.bars:
            self.tunnels.bars.check_visitor(name if parent == self.domain else '', visitor.address)
        if (visitor.scheme == 'http' and self.tls is not None
                and self.domain in (parent, host.strip('[]'))):
            self.tls.check_visitor(request, host)
        tunnel = self.tunnels.get(name) if parent == self.domain and not self.tunnels.only else None
        if tunnel is None:
            name = self._absent(name, parent, host)
            tunnel = self.tunnels.get(name)
        if name and b'via' in request.fields:
            self.onward.check_via(request, name)
        if self.limits.rate and tunnel:
            self.limits.check_rate(tunnel)
        return name

    def _absent(self, name: str, parent: str, host: str) -> str:
        """The name at HOST of a tunnel that is away, or of the only one; '' for the server itself.

        Raises HopFailed.
        """
        if self.tunnels.only:
            return self.tunnels.only.find(host)
        if host == self.domain or (self.domain == 'localhost' and is_address(host)):
            return ''
        others = self.tunnels.others
        if parent == self.domain and (
                self.admission.leases.owner(name, time.time())
                or (is_derived(name) and (others or self.tunnels.starting))
                or (others and others.may_know(name))):
            return name
        raise no_tunnel(f'there is no tunnel at {host}' if host else 'the request names no host')

    # One exchange.

    async def forward(self, visitor: Visitor, exchange: Exchange, name: str) -> None:
        """Pass the request through the tunnel of NAME, the response back; retry where harmless."""
        request = exchange.request
        lines = self.onward.of_request(visitor, request, name)
        interim = None if request.old else exchange.near
        while True:
            stream, ours = (self.tunnels.open_stream(name, visitor, lines)
                            or await self.tunnels.waits.for_stream(name, visitor, lines))
            visitor.begin(stream)
            try:
                await exchange.send(stream, ours, end=not request.upgrade)
                response = await read_final(stream, interim, NEVER, inside=True)
                if exchange.sending:        # the app works on it: the rest may take its time
                    exchange.near.allow(BODY_IDLE)
                length = response.body_length(request.method)
                exchange.keep = (request.keep_alive and exchange.body.finished
                                 and self.tunnels.state < LEAVING and response.status != 101
                                 and (length >= 0 or not request.old))
                lines_back = self.onward.of_response(exchange, response)
                return await exchange.respond(response, length, lines_back, end=False)
            except StreamReset as e:
                if exchange.status or e.code == CANCELLED:      # it can only be cut short
                    raise Disconnected(str(exchange.fault or e)) from e
                if exchange.fault:
                    raise exchange.fault from e
                if not (exchange.repeatable and isinstance(e, SessionLost)):
                    raise self.pages.no_answer(name, e) from e
            except (BadHttp, Incomplete, Overdue) as e:
                if exchange.status:
                    raise Disconnected(str(e)) from e
                raise self.pages.no_answer(name, e) from e
            except asyncio.CancelledError:      # the server ends: what it cuts may not look whole
                exchange.near.reset(CANCELLED, 'the server has shut down')
                raise
            finally:
                visitor.stream = None
                if exchange.sending:
                    await exchange.stop_sending()
                stream.close()

    # One session.

    async def _begin_session(self, visitor: Visitor, request: Request) -> bool:
        """Admit a client, or tell it why not; return True if it now owns the connection."""
        facts = {**UNSERVED, 'client': visitor.address}
        try:
            self._check_version(visitor, request)
            admitted = await self.admission.admit(
                visitor, request, facts, lambda name: self._url(visitor, name, request.host))
        except Refused as e:
            self.counters['refused_' + e.code] += 1
            audit(self.log, 'refused', facts, reason=e.code)
            await self.pages.refuse(visitor.connection, e)
            return False
        if admitted is None:
            done = Refused(200, 'released', 'the name was given back')      # as clients know it
            audit(self.log, 'released', facts, reason=str(done))
            await self.pages.refuse(visitor.connection, done)
            return False
        member, tunnel, goes_on = admitted
        session, connection = member.session, visitor.connection
        detour = self.tunnels.detours.get(tunnel.key)
        welcome = {**(detour.welcome(tunnel.key) if detour and not goes_on else {}),
                   'url': tunnel.url, **session.welcome(), 'user': member.grant.user}
        if self.tunnels.others and member.hello.name is not None:
            welcome['lease'] = self.tunnels.others.lease(tunnel.name)
        connection.transport.write(
            f'HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {PROTOCOL}\r\n'
            f'Localtunnel-Welcome: {json.dumps(welcome)}\r\n\r\n'.encode())
        session.attach(connection)
        self.tunnels.connected(tunnel)
        audit(self.log, 'resumed' if goes_on else 'opened', session.facts, tunnel.url)
        return True

    def _check_version(self, visitor: Visitor, request: Request) -> None:
        """Raises Refused for who speaks another protocol, or speaks it in clear."""
        if request.upgrade != PROTOCOL.encode():
            raise Refused(426, 'version', f'this server speaks {PROTOCOL}; fetch the client from '
                          f'it: {visitor.url_of(self.domain, request.host)}/localtunnel.py')
        if self.tls:
            self.tls.check_session(visitor, self.domain)

    def _url(self, visitor: Visitor, name: str, host: bytes) -> str:
        """The URL of the tunnel of NAME, for a client that dialled HOST."""
        host_name = self.domain if self.tunnels.only else f'{name}.{self.domain}'
        if self.tls and not visitor.front and not self.tls.shows(host_name):
            return f'http://{authority("http", host_name, self._port)}'
        front = self.visitors.front
        return (front and front.url) or visitor.url_of(host_name, host)


# ------------------------------------------------------------------------------------------------
# 12. App
#
# The local program, and the service of one stream from it: `serve` reads the request, `_forward`
# sends it, receives the response and gives it back, as at the server.  Knows nothing of the server
# and of sessions, and not who watches: what happens is told to an observer.
# ------------------------------------------------------------------------------------------------

SLOW = 1.0                      # until people wonder whether a request is answered at all


class App:
    """The local program that visitors reach."""

    def __init__(self, runtime: Runtime, target: Target, upstreams: Upstreams,
                 observer: ClientObserver, words: Words,
                 timeout: float = RESPONSE_TIMEOUT) -> None:
        """UPSTREAMS lead to TARGET.  A response is to begin within TIMEOUT."""
        self.runtime, self.target, self.observer, self.words = runtime, target, observer, words
        self.upstreams = upstreams
        self._timeout = timeout
        self.closed = False                     # True once nobody comes any more
        self.exchanges = 0                      # so far
        self.under_way: dict[Record, bool] = {}     # the oldest first; True: told that it is slow
        # Seams.
        self.seen: Any = ()                     # the exchanges so far, where somebody keeps them
        # Who serves a stream, by the kind of tunnel.
        self.kinds: dict[str, Callable[[Stream], Coroutine[Any, Any, None]]] = {'http': self.serve}
        # Each in turn changes the header lines of requests and responses.
        self.rewrites: list[Rewrite] = []
        # Asked about requests and responses with a body to stream, or an upgrade; what one returns
        # is shown the body, and what comes after an upgrade.  While somebody is `watching`, they
        # are asked about every request.
        self.watching: Sequence[Any] = ()
        self.request_taps: list[Watch] = []
        self.response_taps: list[Watch] = []
        # Told what the app says to a request without a response.
        self.strange: list[Callable[[Request, bytes], None]] = []
        runtime.swept.add(self)

    # Connections.

    async def connect(self) -> Connection:
        """Return a fresh connection.  Raises HopFailed."""
        try:
            return await self.upstreams.dial()
        except (OSError, asyncio.TimeoutError) as e:
            raise self.words.no_app(self.target, e) from e

    def close(self) -> None:
        """Nobody comes any more: close the connections that are idle."""
        self.closed = True
        forget_heads()
        self.upstreams.close()
        self.runtime.swept -= {self, self.upstreams}

    # What takes long.

    def tell_pending(self, record: Record, status: int) -> None:
        """Tell once that RECORD, which is under way, takes long."""
        if not self.under_way.get(record, True):
            self.under_way[record] = True
            self.observer.pending(record, status)

    def sweep(self, now: float, woke_up: bool) -> None:
        """Tell what has become slow."""
        forget_heads()
        for record in tuple(self.under_way):
            if now - record.began < SLOW:
                break
            self.tell_pending(record, record.status)

    # One stream.

    async def serve(self, stream: Stream) -> None:
        """Serve one stream, from its head to its end."""
        began, why = self.runtime.now(), ''
        self.exchanges += 1
        number = next(self.runtime.numbers)
        exchange: Exchange | None = None
        try:
            head = (head_here(stream, MAX_HEAD, MAX_FIELDS)
                    or await read_head(stream, HEAD_TIMEOUT, MAX_HEAD, MAX_FIELDS))
            if head is None:
                raise Incomplete('a stream without a request')
            exchange = Exchange(stream, parse_request(head), began, number)
            self.under_way[exchange] = False
            try:
                await self._forward(stream, exchange)
            except HopFailed as e:
                request = exchange.request
                own = self.words.failed(e, request.get(b'accept'), request.method)
                exchange.status, exchange.why, exchange.answer = e.status, str(e), Count(own.size)
                await stream.write(own.whole(), end=True)
        except (LocaltunnelError, OSError) as e:
            why = f'cut short: {stream.error or e}'
            stream.reset(FAILED, str(e))
        finally:
            stream.close()
            record = exchange or Record(number, began)
            self.under_way.pop(record, None)
            if why:
                record.why = why
            self.observer.exchange(record, self.runtime.now() - began)

    async def _forward(self, stream: Stream, exchange: Exchange) -> None:
        """Send the request to the app, and again if an idle connection had been closed."""
        taps: Sequence[Tap] = ()
        request, lines = exchange.request, exchange.request.onward()
        if exchange.body.whole is None or request.upgrade or self.watching:
            taps = exchange.taps(self.request_taps)
        if self.rewrites:       # they may change it, and it may be shared
            exchange.request = request = copy.copy(request)
            for rewrite in self.rewrites:
                lines = rewrite.of_request(request, lines)
        reused = self.upstreams.take() if exchange.repeatable and not request.upgrade else None
        while True:
            upstream = reused or await self.connect()
            stream.on_lost, whole, response = upstream.abort, False, None
            try:
                if stream.error is not None:
                    stream.check()      # whom it is for may have gone by now
                await exchange.send(upstream, lines, end=False, taps=taps)
                response = await read_final(upstream, stream, self._timeout)
                await self._respond(exchange, response, taps)
                whole = True
                return self.upstreams.give(upstream) if exchange.keep else upstream.close()
            except (Disconnected, BadHttp) as e:
                if stream.error is not None or exchange.status and not (
                        isinstance(e, BadHttp) and e.early):
                    raise       # the response has begun, or nobody waits for it
                if reused is None or not upstream.silent or isinstance(e, Overdue):
                    said = b'' if response else getattr(e, 'head', b'') or upstream.peek()
                    for tell in self.strange:
                        tell(request, said)
                    raise self.words.no_response(self.target, said, upstream.silent, e) from e
                reused = None       # once more, on a fresh one
            finally:
                stream.on_lost = None
                if exchange.sending:
                    await exchange.stop_sending()
                if not whole:
                    upstream.abort()

    def _respond(self, exchange: Exchange, response: Response,
                 request_taps: Iterable[Tap]) -> Awaitable[None]:
        """Pass RESPONSE on, and decide what becomes of the connection.  Await the result."""
        request, block = exchange.request, response.onward(NOT_OF_APPS)
        for rewrite in self.rewrites:
            block = rewrite.of_response(request, block)
        length = response.body_length(request.method)
        exchange.keep = (response.keep_alive and length != UNTIL_CLOSE and response.status != 101
                         and exchange.body is NO_BODY       # else some of it may lie there unread
                         and not logs_in(request, response))
        if response.status == 101:
            self.tell_pending(exchange, 101)
        if length == UNTIL_CLOSE and self.target.scheme == 'https':
            self.observer.hint('length unknown: the app ends this response by closing, and TLS '
                               'hides whether it broke')
        return exchange.respond(response, length, block, end=True, watch=self.response_taps,
                                near_taps=request_taps)


# ------------------------------------------------------------------------------------------------
# 13. Client
#
# Asks the server for a tunnel, and again.  Knows no frames, no HTTP but the request that asks,
# nothing of the app and of the server's inside, and neither who serves nor who watches.
# ------------------------------------------------------------------------------------------------

# What a server may call the URL of a tunnel: it is shown, opened, and given to shells.
PUBLIC_URL = re.compile(r'(?:https?|tcp)://[A-Za-z0-9_.:\[\]-]{1,300}')


class Client:
    """One tunnel, kept up for as long as `run` runs."""

    def __init__(self, app: App, address: ServerAddress, key: bytes, *, token: str,
                 dial: Callable[[float], Awaitable[Connection]], backoff: Backoff,
                 begin: Callable[[], Session], **wish: Any) -> None:
        """DIAL connects to the server at ADDRESS within SECONDS; BEGIN makes a session for APP.

        WISH is what the server is asked for, see Hello.  Where that has no name, the name comes
        from KEY and from what APP leads to, see Target.
        """
        self.runtime, self.address = app.runtime, address
        self.url = ''               # once the server has said it
        self.welcomed = asyncio.Event()
        self.backoff = backoff      # when it tries again
        self.dial, self._begin, self._token = dial, begin, token
        self._observer, self._words = app.observer, app.words
        self._sessions: list[Session] = []          # the current one is the last, the others drain
        self._session: Session | None = None        # the current one, perhaps not connected
        self._changed = asyncio.Event()             # it has lost its connection, or is to end
        self._carried = 0, 0                        # bytes in and out, of sessions that are over
        kind, port = app.target.kind, app.target.public_port
        chosen, long = wish['name'] or port, key.startswith(LONG_NAMES)
        proof = make_proof(key, address.site, kind, f'={chosen}' if chosen else app.target.label)
        self.name = wish['name'] or derive_name(address.site, proof, long)
        self._hello = {**wish, 'kind': kind, 'port': port, 'proof': proof.hex(), 'long': long,
                       'attempt': 0, 'instance': secrets.token_hex(16), 'started': time.time(),
                       'version': __version__}

    @property
    def carried(self) -> tuple[int, int]:
        """Bytes that came through the tunnel so far, and that went back."""
        received, sent = self._carried
        return (received + sum(session.decoder.received for session in self._sessions),
                sent + sum(session.outbox.sent for session in self._sessions))

    # Sessions: the loop, and the single attempt.

    async def run(self) -> None:
        """Keep the tunnel up, or give its name back.  Raises Refused, or what it ends with."""
        while True:
            why = await self._attempt()
            if why is None:
                return
            if self.backoff.once:
                raise LocaltunnelError(why)
            delay = self.backoff.failed(self.runtime.now())
            self._observer.lost(why, delay)
            await asyncio.sleep(delay)

    async def _attempt(self) -> str | None:
        """Connect, and return why another connection is needed, once it is; None if none is."""
        try:
            if not await self._connect(self.backoff.patience(self.runtime.now())):
                return None
            self.backoff.connected(self.runtime.now())
            return await self._until_lost()
        except Refused as e:
            if e.code == 'sni' and not self.address.sni:        # a balancer there goes by it
                self.address.sni = self.address.wants['sni'] = f'{self.name}.{self.address.site}'
                return await self._attempt()
            if self.backoff.once or not self._may_pass(e):
                raise
            return str(e)
        except (LocaltunnelError, OSError, asyncio.TimeoutError) as e:
            return self._words.unreachable(e, str(self.address))

    def _may_pass(self, refused: Refused) -> bool:
        """True if a later attempt may succeed."""
        if refused.code == 'superseded' and not self.url:
            return True     # what has just begun was not started earlier: a clock is wrong
        return not refused.final and (
            bool(self.url) or refused.status == 503 or refused.code == 'slow_down')

    async def _until_lost(self) -> str:
        """Wait until a new connection is needed; return why.  Raises Refused at a final goodbye."""
        session = self._session
        assert session is not None
        while session.connection is not None and session.goaway is None and session.error is None:
            self._changed.clear()
            await self._changed.wait()
        if session.goaway is None and session.error is None:
            return 'the connection to the server broke'     # and the session may go on
        self._session = None
        if session.goaway is None:
            return str(session.error)
        code, text = session.goaway
        if code in (SUPERSEDED, REVOKED):
            await self._finish({session})
            status, word = (409, 'superseded') if code == SUPERSEDED else (401, 'token')
            raise Refused(status, word, text, final=True)
        return text

    async def _connect(self, timeout: float) -> bool:
        """Dial, ask, and go on with the old session or begin a new one.

        Return False if the name was given back, and nothing is to be served.
        """
        connection = await self.dial(timeout)
        began = self.runtime.now()
        overdue = self.runtime.loop.call_later(         # it may say something now and then
            timeout, connection.set_exception, Overdue('the welcome did not come in time'))
        try:
            welcome = await self._ask(connection, timeout)
        except BaseException:
            connection.abort()
            raise
        finally:
            overdue.cancel()
        round_trip = self.runtime.now() - began
        if welcome is None:
            connection.close()
            self.address.on_lease('')
            self._observer.note(f'the name {self.name} was given back')
            return False
        session = self._session
        if session is None or not session.goes_on(welcome):
            session = self._new_session()
            self._observer.welcome(welcome)
        session.attach(connection, welcome)
        if 'lease' in welcome:
            self.address.on_lease(welcome['lease'])
        before, self.url = self.url, str(welcome['url'])
        if before:
            self._observer.back(self.url)       # which is https now if a certificate has come
        else:
            self.welcomed.set()
            self._observer.ready(self.url, printable(str(welcome.get('user', ''))[:MAX_TEXT]),
                                 round_trip)
        return True

    async def _ask(self, connection: Connection, timeout: float) -> dict[str, Any] | None:
        """The server's welcome to the tunnel asked for; None where the name was given back.

        Raises Refused.
        """
        self._hello['attempt'] += 1
        hello, host = dict(self._hello), str(self.address).partition('://')[2]
        if self.address.lease:
            hello['lease'] = self.address.lease
        if self._session is not None:
            hello.update(self._session.claim())
        if not is_address(self.address.site):
            host = f'{self.name}.{host}'
        lines = [f'GET {WELL_KNOWN} HTTP/1.1', f'Host: {host}', 'Connection: Upgrade',
                 f'Upgrade: {PROTOCOL}', f'Localtunnel-Hello: {json.dumps(hello)}']
        if self._token:
            lines.append(f'Authorization: Bearer {self._token}')
        await connection.write('\r\n'.join(lines).encode() + b'\r\n\r\n')
        try:
            response = await read_final(connection, None, timeout)
        except (BadHttp, Incomplete) as e:
            said = getattr(e, 'head', b'') or connection.peek()
            raise self._words.no_answer(self.address, said, e) from e
        if response.status != 101:
            refused = await self._words.refusal(connection, response, self.address,
                                                self._hello['release'])
            if refused.code != 'released':
                raise refused
            return None
        try:
            welcome = json.loads(response.get(b'localtunnel-welcome') or b'{}')
        except (ValueError, RecursionError):
            welcome = None
        if not isinstance(welcome, dict) or not PUBLIC_URL.fullmatch(str(welcome.get('url'))):
            raise Refused(502, 'no_upgrade', f'{self.address} is not a localtunnel server: it sent '
                          'no welcome with a URL')
        return welcome

    def _new_session(self) -> Session:
        for old in self._sessions[:-MAX_DRAINING]:
            old.end(Disconnected('too many sessions were draining'))
        session = self._begin()

        def changed() -> None:
            if session.state == OVER and session in self._sessions:
                received, sent = self._carried
                self._sessions.remove(session)
                self._carried = received + session.decoder.received, sent + session.outbox.sent
            self._changed.set()
        session.on_change = changed
        self._sessions.append(session)
        self._session = session
        return session

    async def stop(self) -> None:
        """Say goodbye, and let open exchanges finish."""
        running = sum(len(session.streams) for session in self._sessions)
        if running:
            self._observer.note(f'finishing open requests ({running}); Ctrl-C again stops now')
        for session in tuple(self._sessions):
            session.leave(DRAINING, 'the client is stopping')
        await self._finish(set(self._sessions))

    async def _finish(self, sessions: set[Session]) -> None:
        lingers_until = self.runtime.now() + LINGER

        def finished() -> bool:
            if self.runtime.now() > lingers_until:
                for stream in [stream for s in sessions for stream in s.streams.values()]:
                    if stream.timeout == NEVER:         # a WebSocket would stay
                        stream.reset(CANCELLED, 'the client is stopping')
            return not any(s.connection and s.error is None for s in sessions)
        await look_until(finished, DRAIN)
        for session in sessions:
            session.end(Disconnected('the client has stopped'))


# ================================================================================================
# II. AROUND IT
#
# First what part I is handed, and what annexes share: the rooms Seams to DNS.  Then the annexes,
# which can be left out: each stands in rooms of its own, uses no other, and is named outside of
# them once, in the tuple ANNEXES of part III.  Who deletes its rooms and its word there has a file
# that works without it.
# ================================================================================================

# ------------------------------------------------------------------------------------------------
# 14. Seams
#
# What the tunnel calls, and leaves to others: part I has a place for each of these, empty or almost
# so, and knows nothing of who fills it.
# ------------------------------------------------------------------------------------------------

class Observer:
    """Listens to what happens at one end; this one ignores it."""

    def note(self, text: str, event: str = 'note', **facts: Any) -> None:
        """Something to know: FACTS belong to TEXT, which does not repeat them."""

    def exchange(self, exchange: Record, seconds: float) -> None:
        """EXCHANGE has ended, after SECONDS."""


class ClientObserver(Observer):
    """Listens to what a client does."""

    def ready(self, url: str, user: str, round_trip: float) -> None:
        """Visitors can come, for the first time: at URL, to a client of USER, '' if not known.

        The server's answer took ROUND_TRIP seconds.
        """

    def pending(self, exchange: Record, status: int) -> None:
        """EXCHANGE takes long: more than SLOW, or an upgrade.  STATUS is 0 without an answer."""

    def back(self, url: str) -> None:
        """Visitors can come again, to URL."""

    def lost(self, why: str, seconds: float) -> None:
        """The server can't be reached; the next attempt is in SECONDS."""

    def hint(self, text: str) -> None:
        """Advice for the user."""

    def welcome(self, said: dict[str, Any]) -> None:
        """A new session begins: what the server SAID of it; before `ready` or `back`."""

    def also(self, name: str, text: str) -> None:
        """TEXT is what there is to know of the tunnel about NAME."""


class Observers:
    """Tells several observers what it is told, one after the other."""

    def __init__(self, *observers: Observer) -> None:
        self._observers: list[Observer] = []
        for one in observers:       # several are told no slower for having come one by one
            self._observers += one._observers if isinstance(one, Observers) else [one]

    def exchange(self, exchange: Record, seconds: float) -> None:
        """As an Observer is told; for each request, the general way would take thrice as long."""
        for observer in self._observers:
            observer.exchange(exchange, seconds)

    def __getattr__(self, name: str) -> Callable[..., None]:
        methods = [getattr(observer, name) for observer in self._observers]

        def tell(*what: Any, **facts: Any) -> None:
            for method in methods:
                method(*what, **facts)
        self.__dict__[name] = tell      # from now on it is found at once
        return tell


class Rewrite:
    """What an app and its visitors are told of each other; this one changes nothing."""

    def of_request(self, request: Request, block: bytes) -> bytes:
        """The header lines in BLOCK as the app is to see them.  Raises HopFailed."""
        return block

    def of_response(self, request: Request, block: bytes) -> bytes:
        """The header lines in BLOCK, of the response to REQUEST, as its visitor is to see them."""
        return block


class Kind:
    """Tunnels of a kind other than http, which are reached in another way."""

    def check(self, asked: Candidate) -> None:
        """Raises Refused where ASKED may not have a place, or the one that its tunnel has."""
        raise NotImplementedError

    async def place(self, asked: Candidate) -> None:
        """Find a place for the tunnel of ASKED, lease it, and say in its `url` where it is.

        Raises Refused and Disconnected, and leaves nothing behind then.
        """
        raise NotImplementedError

    async def open(self, tunnel: Tunnel) -> None:
        """Let visitors come to TUNNEL, which has a place and a client."""
        raise NotImplementedError

    async def free(self, tunnel: Tunnel) -> bool:
        """Free what TUNNEL has leased; return whether there was anything."""
        raise NotImplementedError


class Detour:
    """Who has the requests of some tunnels, and decides which of them go on to a client."""

    async def take(self, visitor: Visitor, exchange: Exchange, key: str) -> None:
        """Answer the request of VISITOR to the tunnel of KEY.  Raises HopFailed."""
        raise NotImplementedError

    def waiting(self, key: str) -> int:
        """How many requests to the tunnel of KEY wait here."""
        raise NotImplementedError

    def welcome(self, key: str) -> dict[str, Any]:
        """What a new client of the tunnel of KEY is told beside its URL."""
        raise NotImplementedError


class Bars:
    """Whom the operator keeps out, in a file."""

    def check_visitor(self, name: str, address: str) -> None:
        """Raises HopFailed where nobody may visit NAME from ADDRESS; '' is the server itself."""
        raise NotImplementedError


class Others:
    """The other servers behind one balancer, from which clients may come at any time."""

    def may_know(self, name: str) -> bool:
        """True if others may know NAME, of which this server knows nothing."""
        raise NotImplementedError

    async def bring(self, lease: str, name: str, owner: str, token: str) -> None:
        """OWNER comes with TOKEN for NAME, and with the LEASE that another may have signed.

        Raises Refused.
        """
        raise NotImplementedError

    def lease(self, name: str) -> str:
        """The lease of NAME, signed for others."""
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------
# 15. Places
#
# Where the app and the server are, how they are reached, and when a client tries again.
# ------------------------------------------------------------------------------------------------

def is_loopback(host: str) -> bool:
    """Return True if HOST names this machine and no other."""
    if is_address(host):
        return ipaddress.ip_address(host.strip('[]')).is_loopback
    return host == 'localhost' or host.endswith('.localhost')


HANDSHAKE_TIMEOUT = 15.0        # from connecting to the server until its welcome
FIRST_ATTEMPTS = 4.0            # the same in the first HELD seconds after a loss: visitors wait
CONNECT_TIMEOUT = 10.0          # to reach the app
POOL_IDLE = 4.0                 # an idle connection to the app may be reused: Node closes after 5


class Target:
    """What a tunnel leads to, and its kind.

    `label` is its full spelling, from which the derived name comes.
    """

    def __init__(self, scheme: str, host: str = 'localhost', port: int = 0, path: str = '', *,
                 text: str = '', kind: str = 'http', public_port: int = 0) -> None:
        """SCHEME tells how to connect, see App.  TEXT is for people.  PUBLIC_PORT is asked for,
        where tunnels of this KIND have one.
        """
        self.scheme, self.host, self.port, self.path = scheme, host, port, path
        self.kind, self.public_port = kind, public_port
        self.authority = authority(scheme, host, port) if port else host
        self.local = is_loopback(host)
        if port:
            self.text = text or self.authority + path
            self.label = f'{scheme}://{bracketed(host)}:{port}{path}'
        else:
            self.text = text or f'{scheme}:{path}'
            self.label = f'{scheme}:{os.path.abspath(path) if path else ""}'


Route = Callable[[str, int], Awaitable[socket.socket]]


class ServerAddress:
    """Where the server is: `site` is the host that the user named, for which proofs are made."""

    def __init__(self, scheme: str, site: str, port: int) -> None:
        self.scheme, self.site, self.port = scheme, site, port
        self.route: Route | None = None         # a seam: a socket to (host, port), not dialled here
        self.session: type[Session] = Session               # seams: what is begun with it, and
        self.window: type[ReceiveWindow] = ReceiveWindow    # what its streams promise
        self.wants: dict[str, Any] = {}         # a seam: of it beside the tunnel, see Limits
        self.sni = ''                           # what TLS is told instead, once it asks for that
        self.lease = ''                         # a seam: what it is shown at each attempt, and
        self.on_lease: Callable[[object], None] = lambda lease: None    # who has a new one, or ''

    def __str__(self) -> str:
        return f'{self.scheme}://{authority(self.scheme, self.site, self.port)}'


def addresses(host: str) -> list[str]:
    """Return what to dial for HOST: both loopback addresses for this machine, else HOST."""
    return ['127.0.0.1', '::1'] if is_loopback(host) and not is_address(host) else [host]


async def first_to_answer(hosts: Sequence[str], timeout: float,
                          dial: Callable[[str], Awaitable[Connection]]) -> Connection:
    """Return what DIAL makes of the first of HOSTS that answers, each within TIMEOUT."""
    failures: list[Exception] = []
    for host in hosts:
        try:
            return await asyncio.wait_for(dial(host), timeout)
        except (OSError, asyncio.TimeoutError) as e:
            failures.append(e)
    raise min(failures, key=lambda e: isinstance(e, ConnectionRefusedError))    # it says least


async def connect(runtime: Runtime, host: str, port: int, tls: ssl.SSLContext | None = None,
                  name: str = '', sock: socket.socket | None = None) -> Connection:
    """A connection to PORT of HOST, or over SOCK; with TLS, to the server called NAME."""
    where: dict[str, Any] = {'sock': sock} if sock else {'host': host, 'port': port}
    _, connection = await runtime.loop.create_connection(
        lambda: Connection(runtime), ssl=tls, server_hostname=name if tls else None, **where)
    return connection


Dial = Callable[[Target], Awaitable[Connection]]


UPSTREAM_SILENT = 0.2           # a fresh connection to the app without a byte: it may be serial


class Upstreams:
    """Connections to an app: new ones, and those that may carry another request.

    An app that serves one connection at a time must never be stalled by an idle one: while a fresh
    connection has been silent for UPSTREAM_SILENT, idle ones are closed and none is kept.
    """

    def __init__(self, runtime: Runtime, target: Target, tls: ssl.SSLContext | None = None) -> None:
        """TLS is for an https TARGET."""
        self._runtime, self._target, self._tls = runtime, target, tls
        # A seam: how to connect, by the scheme of a target.
        self.dialers: dict[str, Dial] = {
            'http': self._by_host, 'https': self._by_host, 'unix': self._by_path}
        self._hosts = addresses(target.host)                # the one that answered last comes first
        self._idle: list[tuple[Connection, float]] = []     # each with since when; the latest last
        self._fresh: set[Connection] = set()                # on their first request
        self._silent: set[Connection] = set()               # of these, too long without a byte
        runtime.swept.add(self)

    async def _by_host(self, target: Target) -> Connection:
        async def dial(host: str) -> Connection:
            connection = await connect(self._runtime, host, target.port, self._tls, target.host)
            if self._hosts[0] != host:
                self._hosts.reverse()
            return connection
        return await first_to_answer(tuple(self._hosts), CONNECT_TIMEOUT, dial)

    async def _by_path(self, target: Target) -> Connection:
        _, connection = await asyncio.wait_for(self._runtime.loop.create_unix_connection(
            lambda: Connection(self._runtime), target.path), CONNECT_TIMEOUT)
        return connection

    async def dial(self) -> Connection:
        """Return a fresh one.  Raises OSError and asyncio.TimeoutError."""
        connection = await self.dialers[self._target.scheme](self._target)
        self._fresh.add(connection)
        self._runtime.loop.call_later(UPSTREAM_SILENT, self._still_silent, connection)
        return connection

    def _still_silent(self, connection: Connection) -> None:
        if connection in self._fresh and connection.silent and connection.error is None:
            self._silent.add(connection)
            self.close()
        self._fresh.discard(connection)

    def take(self) -> Connection | None:
        """Return an idle connection that can be trusted, or None."""
        while self._idle:
            connection, since = self._idle.pop()
            if (self._runtime.now() - since < POOL_IDLE and not connection.unread
                    and not connection.eof and connection.error is None):
                connection.silent = True
                return connection
            connection.close()
        return None

    def give(self, connection: Connection) -> None:
        """Keep CONNECTION, which has nothing under way, for another request."""
        self._fresh.discard(connection)
        if self._silent:
            self._silent = {c for c in self._silent if c.silent and c.error is None}
        if self._silent or connection.unread or connection.eof or connection.error:
            return connection.close()
        self._idle.append((connection, self._runtime.now()))

    def close(self) -> None:
        """Close what is idle."""
        for connection, _ in self._idle:
            connection.close()
        self._idle.clear()

    def sweep(self, now: float, woke_up: bool) -> None:
        """Close what has been idle for too long."""
        while self._idle and now - self._idle[0][1] >= POOL_IDLE:
            self._idle.pop(0)[0].close()


BACKOFF_FIRST, BACKOFF_MOST = 0.1, 15.0     # between attempts, each shortened at random
BACKOFF_SOON, SOON = 2.0, 60.0  # at most, and for how long after a loss: restarts are quick
SETTLED = 1.0                   # a connection that lasted this long resets the backoff


class Backoff:
    """How long a client waits before it tries again: not at all, then longer and longer.

    Each wait is shortened by chance, so that the clients of a server do not all come back at once.
    """

    def __init__(self, now: float, once: bool = False) -> None:
        self.once = once            # True: never; it ends with an error
        self._welcomed = False      # has there been a connection at all?
        self._began = NEVER         # since when there is one; NEVER while there is none
        self._lost = now            # when the last one that lasted was lost, or when all began
        self._failures = 0          # since then

    def connected(self, now: float) -> None:
        """There is a connection."""
        self._welcomed, self._began = True, now

    def failed(self, now: float) -> float:
        """Seconds to wait, now that a connection is lost, or could not be made."""
        if now - self._began > SETTLED:
            self._lost, self._failures = now, 0
        self._began = NEVER
        self._failures += 1
        if self._welcomed and self._failures == 1:
            return 0.0
        most = min(BACKOFF_SOON if now - self._lost < SOON else BACKOFF_MOST,
                   BACKOFF_FIRST * 2 ** min(self._failures, 10))
        return random.uniform(most / 2, most)

    def patience(self, now: float) -> float:
        """How long the next attempt may take: not long while visitors wait for it."""
        waited_for = self._welcomed and now - self._lost < HELD
        return FIRST_ATTEMPTS if waited_for else HANDSHAKE_TIMEOUT


# ------------------------------------------------------------------------------------------------
# 16. Doors
#
# What a server listens on, and how that is closed so that nobody who came before is lost.
# ------------------------------------------------------------------------------------------------

BACKLOG = 1024                  # connections that wait to be accepted
ACCEPTED_TOGETHER = 16          # in one turn: few enough to close others before descriptors run out
ENTER_TURNS = 4                 # of the loop, until an accepted connection has become a visitor


class GuardedDoor:
    """One where a connection does not become a visitor at once."""
    busy: Any = False           # true while some are on their way in

    async def close(self) -> None:
        """Let nobody in any more."""
        raise NotImplementedError


class Doors:
    """What a server listens on."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.together = ACCEPTED_TOGETHER       # a seam: less where descriptors are few
        self.guarded: list[GuardedDoor] = []    # a seam: where visitors take their time to come in
        # A seam: who is told that the server ends, while all doors are still open.
        self.before_close: list[Callable[[], Awaitable[None]]] = []
        self._plain: set[asyncio.AbstractServer] = set()
        self._staying: set[asyncio.AbstractServer] = set()      # others, open to the last

    @property
    def busy(self) -> bool:
        """True while somebody who was let in has yet to be served."""
        return any(door.busy for door in self.guarded)

    async def open(self, sock: socket.socket, serve: Serve,
                   stays: bool = False) -> asyncio.AbstractServer:
        """Let SERVE have each connection to SOCK; if it STAYS, while the server drains, too."""
        make = functools.partial(Connection, self._runtime, serve)
        door = await self._runtime.loop.create_server(make, sock=sock, backlog=self.together)
        sock.listen(BACKLOG)        # asyncio accepts as many in one turn as its backlog says
        (self._staying if stays else self._plain).add(door)
        return door

    def close_one(self, door: asyncio.AbstractServer) -> None:
        """Listen no longer there."""
        door.close()
        self._plain.discard(door)

    async def close(self, handed_over: bool = False) -> None:
        """Let nobody in any more, and lose nobody who came before."""
        for door in self._plain:
            for sock in getattr(door, 'sockets', None) or ():
                with contextlib.suppress(NotImplementedError):      # Windows
                    self._runtime.loop.remove_reader(sock)
        for _ in range(ENTER_TURNS):        # close() drops what was accepted in this turn
            await asyncio.sleep(0)
        for door in (*self._plain, *(self._staying if handed_over else ())):
            door.close()
        for guarded in self.guarded:
            await guarded.close()


# ------------------------------------------------------------------------------------------------
# 17. Header lines
#
# Those of requests and responses as they pass a server: what it adds, and what it takes away.
# ------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=1)
def date_line(second: int) -> str:
    """Return a Date line for SECOND, in Unix seconds (RFC 9110 6.6.1)."""
    import email.utils
    return f'Date: {email.utils.formatdate(second, usegmt=True)}'


@functools.lru_cache(maxsize=1024)
def via(name: str, domain: str) -> bytes:
    """What marks a request that passed the tunnel of NAME, behind its version (RFC 9110 7.6.3)."""
    return f' {name}.{domain} (localtunnel)'.encode()


MADE_ANEW = HOP_BY_HOP.union((b'via',))         # at each hop
PASSING = 'GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, TRACE'     # and what else apps know


class Onward:
    """The header lines of requests and responses, as they go on."""

    def __init__(self, domain: str) -> None:
        self._domain = domain.lower()
        # A seam: each in turn changes the header lines of a response.
        self.changes: list[Callable[[Response, bytes], bytes]] = []

    def of_request(self, visitor: Visitor, request: Request, name: str) -> bytes:
        """Return the header lines of REQUEST to pass on."""
        before = request.get(b'via') + b', ' if b'via' in request.fields else b''
        counts = b'max-forwards' in request.fields and request.method in (b'TRACE', b'OPTIONS')
        # First of all, since what is malformed ends the connection.
        lines = request.onward(MADE_ANEW.union((b'max-forwards',)) if counts else MADE_ANEW,
                               trusted=False)
        more = b'' if not counts else (
            b'Max-Forwards: %d\r\n' % self._hops_left(request))
        if b'host' not in request.fields:
            more += b'Host: %b\r\n' % (request.host or self._domain.encode())
        return b'%b%bX-Forwarded-Host: %b\r\nVia: %b%b%b\r\n%b' % (
            lines, visitor.x_forwarded, visitor.host or request.host, before,
            b'1.0' if request.old else b'1.1', via(name, self._domain), more)

    def check_via(self, request: Request, name: str) -> None:
        """Raises HopFailed where REQUEST has passed the tunnel of NAME before."""
        if via(name, self._domain) in request.fields[b'via']:
            raise HopFailed(508, f'the request came back to {name}, which it had passed '
                            'before: the tunnel leads to itself',
                            cure="give the client your app's own address, not a public one")

    @staticmethod
    def _hops_left(request: Request) -> int:
        """Return its Max-Forwards less one.  Raises HopFailed (RFC 9110 7.6.2, 9.3.7)."""
        value = request.fields[b'max-forwards']
        hops = int(value) if value.isdigit() and len(value) <= MAX_LENGTH_DIGITS else -1
        why = 'Max-Forwards lets this request go no further'
        if hops == 0 and request.method == b'OPTIONS':
            raise HopFailed(200, why, 'Allow: ' + PASSING)
        if hops <= 0:
            raise HopFailed(501, why)
        return hops - 1

    @staticmethod
    def of_own(exchange: Exchange) -> list[str]:
        """Return the header lines of this hop for a response of ours; `exchange.keep` is known."""
        if exchange.keep and not exchange.request.old:
            return []
        return ['Connection: keep-alive' if exchange.keep else 'Connection: close']

    def of_response(self, exchange: Exchange, response: Response) -> bytes:
        """Return the header lines of RESPONSE to pass on; `exchange.keep` is known."""
        block = response.onward()
        for change in self.changes:
            block = change(response, block)
        if response.status == 101:
            return block
        if not exchange.keep:
            block += b'Connection: close\r\n'
        elif exchange.request.old:
            block += b'Connection: keep-alive\r\n'
        if b'date' not in response.fields:
            block += b'%b\r\n' % date_line(int(time.time())).encode()
        return block


# ------------------------------------------------------------------------------------------------
# 18. Own pages
#
# What both ends answer themselves: its form, and how it is written so that one who does not read it
# holds little, and not for long.
# ------------------------------------------------------------------------------------------------

PAGE_PART = 16 * KIB            # of a page of ours in one write: a stalled reader holds no more
PAGE_STALLED = 20.0             # for a part of it to be read
PAGE_HEADERS = [      # no script, no other host
    "Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'",
    'X-Content-Type-Options: nosniff']


async def write_own(connection: Connection, *message: bytes) -> None:
    """Write a MESSAGE of our own part by part, as it is read.

    No budget counts what it takes, so a reader that stalls must hold little, and not for long.
    """
    with contextlib.suppress(AttributeError):       # before Python 3.11 TLS that has just ended
        # One part has left before the next; not 0, by which TLS never goes on.
        connection.transport.set_write_buffer_limits(1)
    usual, connection.timeout = connection.timeout, PAGE_STALLED
    try:
        for piece in message:
            for at in range(0, len(piece), PAGE_PART):
                if connection.transport.is_closing():       # asyncio logs each write then
                    raise Disconnected('the reader of our response went away')
                await connection.write(memoryview(piece)[at:at + PAGE_PART])
    except Overdue as e:
        raise Disconnected('our response was not read in time') from e
    finally:
        connection.timeout = usual


class Own:
    """A response of our own to METHOD: its content type is FORM, its body PIECES.

    EXTRA are header lines, and so is what its methods are given, which belongs to this hop.
    """

    def __init__(self, status: int, form: str, pieces: Sequence[bytes], extra: Sequence[str] = (),
                 method: bytes = b'GET') -> None:
        self.status, self._form, self._extra = status, form, extra
        self._length = sum(map(len, pieces))
        self._pieces, self.size = (pieces, self._length) if method != b'HEAD' else ((), 0)

    def _head(self, more: Sequence[str]) -> bytes:
        length = [f'Content-Length: {self._length}'] * (self.status != 204)
        return '\r\n'.join([
            f'HTTP/1.1 {self.status} {http.HTTPStatus(self.status).phrase}',
            f'Content-Type: {self._form}', *length, 'Cache-Control: no-store', *self._extra, *more,
            date_line(int(time.time())), '', '']).encode()

    def whole(self, *more: str) -> bytes:
        """Return all of it."""
        return b''.join((self._head(more), *self._pieces))

    async def write(self, connection: Connection, *more: str) -> None:
        """Write it, as it is read."""
        if self.size > PAGE_PART:
            await write_own(connection, self._head(more), *self._pieces)
        else:
            await write_own(connection, self.whole(*more))


HTML = 'text/html; charset=utf-8'
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><title>{title}</title>
<style>
:root {{ --ink: #1d2433; --dim: #5a6475; --line: #d9dee7; --paper: #fff; --ground: #f4f6f9;
--good: #1a7f4b; --bad: #c4314b }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e8ebf1; --dim: #a2acbd; --line: #3a4252;
--paper: #1d222c; --ground: #13161d; --good: #4cc38a; --bad: #ff7a90 }} }}
* {{ box-sizing: border-box }}
body {{ font: 16px/1.6 system-ui, sans-serif; margin: 0; padding: 8vh 1em; color: var(--ink);
background: var(--ground) }}
main {{ max-width: 42em; margin: auto; padding: 1.75em clamp(1.25em, 5vw, 2.5em);
background: var(--paper); border: 1px solid var(--line); border-radius: 14px;
overflow-wrap: anywhere }}
h1 {{ font-size: 1.5em; line-height: 1.25; margin: 0 0 .75em }}
pre {{ background: var(--ground); padding: .8em 1em; border-radius: 8px; white-space: pre-wrap }}
code, pre {{ font: .9em/1.6 ui-monospace, monospace }}
</style>
<main><h1>{title}</h1>{text}</main></html>
"""


def simple_page(error: HopFailed) -> str:
    """The page that says what ERROR says, and no more."""
    title = f'{error.status} {http.HTTPStatus(error.status).phrase}'
    return PAGE.format(title=title, text=f'<p>{html.escape(printable(str(error)))}</p>')


class Failures:
    """What is said where something failed; `page`, for browsers, is a seam."""
    page: Callable[[HopFailed], str] = staticmethod(simple_page)

    def failed(self, error: HopFailed, accept: bytes, method: bytes = b'GET') -> Own:
        """What METHOD is told of ERROR, in the form that ACCEPT prefers."""
        phrase, said = http.HTTPStatus(error.status).phrase, printable(str(error))
        more: Sequence[str] = [f'Localtunnel-Failed: {error.hop}'] * (error.status >= 400)
        if b'text/html' in accept:
            form, text, more = HTML, self.page(error), [*PAGE_HEADERS, *more]
        elif b'json' in accept:
            form, text = 'application/json', json.dumps(
                {'error': phrase, 'status': error.status, 'message': said}) + '\n'
        else:
            form, text = 'text/plain; charset=utf-8', f'{error.status} {phrase}: {said}\n'
        return Own(error.status, form, [text.encode()], [*more, *error.extra], method)


def parse_hostless(head: bytes) -> Request:
    """Parse HEAD as of HTTP/1.0, which may lack a Host: balancers' checks often do."""
    return parse_request(head.replace(b' HTTP/1.1\r\n', b' HTTP/1.0\r\n', 1))


def no_room(name: str) -> HopFailed:
    """Why one more request can't pass the tunnel of NAME."""
    return HopFailed(503, f'{name} has too many requests at once; try again soon',
                     f'Retry-After: {RETRY_AFTER}', hop='client',
                     cure='let requests end sooner, or start more clients with --share')


# One of a server: its type and its bytes in pieces, for who reached it at an address.
Page = Callable[[str], Tuple[str, Sequence[bytes]]]
_ACCEPT = re.compile(rb'(?im)^accept:([^\r\n]*)')


class Pages(Dict[bytes, Page], Failures):
    """What a server says itself: the pages of its own name, by path, and what went wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.everywhere: dict[bytes, Page] = {}     # of any Host, and over http alike

    def find(self, request: Request, scheme: str) -> Own:
        """The page that REQUEST asks for, which came by SCHEME.  Raises HopFailed."""
        page = self.everywhere.get(request.target) or self.get(request.target.partition(b'?')[0])
        if page is None:
            raise HopFailed(404, 'there is no such page here')
        if request.method not in (b'GET', b'HEAD'):
            raise HopFailed(405, 'this page can only be read', 'Allow: GET, HEAD')
        form, pieces = page(f'{scheme}://{request.host.decode()}')
        return Own(200, form, pieces, PAGE_HEADERS, request.method)

    async def last_words(self, connection: Connection, error: BadHttp | Overdue,
                         head: bytes | None) -> None:
        """Tell a visitor, so that it arrives, what is wrong with HEAD, or what has come of one."""
        here = connection.peek()
        if isinstance(error, Overdue):
            if b'\r\n'.startswith(here):
                return
            head, error = None, BadHttp(408, 'the request did not arrive in time')
        accept = _ACCEPT.search(head or here)
        own = self._hostless(head or b'') or self.failed(
            HopFailed(error.status, str(error)), accept.group(1) if accept else b'')
        with contextlib.suppress(LocaltunnelError, OSError):    # the visitor did not wait
            await own.write(connection, 'Connection: close')
            await connection.linger()

    def _hostless(self, head: bytes) -> Own | None:
        """What HEAD gets that lacks nothing but a Host, if its page is one of any Host."""
        try:
            request = parse_hostless(head)
            if request.host or request.target not in self.everywhere:
                return None
            return self.find(request, 'http')
        except BadHttp:
            return None
        except HopFailed as e:
            return self.failed(e, request.get(b'accept'), request.method)

    @staticmethod
    def no_answer(name: str, error: LocaltunnelError) -> HopFailed:
        """Why there is none from the client of NAME, which failed with ERROR."""
        if isinstance(error, StreamReset) and error.code == OVERLOADED:
            return no_room(name)
        if isinstance(error, StreamReset):
            return HopFailed(502, f'the tunnel failed: {error}', hop='client',
                             cure='see what the client says')
        if isinstance(error, Overdue):
            return HopFailed(504, f'the client of {name} took too long', hop='client',
                             cure='see whether its machine is awake and online')
        return HopFailed(502, f'the client of {name} gave no proper answer: {error}', hop='client',
                         cure='fetch the client anew from its server')

    @staticmethod
    async def refuse(connection: Connection, why: Refused) -> None:
        """Tell a client WHY it gets no session."""
        reason = {'error': why.code, 'message': str(why), 'final': why.final}
        more = {429: ['Connection: close', f'Retry-After: {RETRY_AFTER}'],
                426: ['Connection: close, Upgrade', f'Upgrade: {PROTOCOL}']}
        await Own(why.status, 'application/json', [json.dumps(reason).encode() + b'\n']).write(
            connection, *more.get(why.status, ['Connection: close']))


# ------------------------------------------------------------------------------------------------
# 19. Plain words
#
# What went wrong on the way to a server or an app, in one sentence with its cure.
# ------------------------------------------------------------------------------------------------

# Where trying again can't help: words in what TLS complains of, and a sentence about {0}, with a
# cure {1} for distrust, or the reason {2}.
TLS_FAULTS = {
    "mismatch|doesn't match": 'the certificate of {0} is for another name',
    'has expired': 'the certificate of {0} has expired (renew it there), or the clock of this '
                   'machine is wrong',
    'not yet valid': 'the certificate of {0} is not valid yet; check the clocks of both machines',
    'self.signed|local issuer': 'the certificate of {0} is not signed by an authority that this '
                                'machine knows; {1}',
    'CERTIFICATE_VERIFY_FAILED': "the certificate of {0} can't be trusted ({2}); {1}",
    'WRONG_VERSION_NUMBER|record layer': '{0} does not speak TLS on this port; if that is '
                                         'intended, use http:// instead of https://',
}


def tls_fault(error: BaseException, host: str,
              cure: str = 'name the authority with --ca FILE, or use --insecure') -> str:
    """Return one sentence for what is wrong with the TLS of HOST, '' if it may pass by itself."""
    reason = printable(str(getattr(error, 'verify_message', '') or error))
    sentences = (sentence for words, sentence in TLS_FAULTS.items()
                 if re.search(words, f'{reason} {error}'))
    return next(sentences, '').format(host, cure, reason)


def explain(error: BaseException, where: str) -> str:
    """Return one sentence for why WHERE can't be reached."""
    if isinstance(error, (Overdue, asyncio.TimeoutError, TimeoutError)):
        return f'{where} does not answer'
    if isinstance(error, (BadHttp, Incomplete)):
        return f'{where} gave no proper answer: {error}'
    if isinstance(error, LocaltunnelError):
        return str(error)
    if isinstance(error, ConnectionRefusedError):
        return f'nothing is listening on {where}'
    if isinstance(error, socket.gaierror):
        return f"can't find the host of {where}: {error.strerror}"
    if isinstance(error, FileNotFoundError):
        return f'{where} does not exist'
    if isinstance(error, ssl.SSLError):
        return tls_fault(error, where) or f'TLS with {where} failed: {printable(str(error))}'
    return f"can't reach {where}: {plainly(error)}"


def no_files_left(error: BaseException | None) -> bool:
    """Return True if ERROR is that no more files, and connections, may be open."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


# What servers say in a 400 to a request without TLS: nginx, Apache, Go, Tomcat.
WANTS_TLS = re.compile(rb'plain HTTP request was sent to HTTPS port|speaking plain HTTP to an SSL'
                       rb'|HTTP request to an HTTPS server|host and port requires TLS')


def by_tls(where: str) -> str:
    """Return the cure for speaking without TLS to WHERE."""
    return f'use https://{where.partition("://")[2] or where}'


def speaks_tls(where: str) -> str:
    """Return a sentence with the cure for speaking without TLS to WHERE."""
    return f'{where} speaks TLS: {by_tls(where)}'


def unanswered(where: str, perhaps_tls: bool) -> str:
    """Return a sentence for the silence of WHERE, which PERHAPS wants TLS."""
    return f'{where} closed the connection without an answer' + (
        f'; if it speaks TLS, {by_tls(where)}' if perhaps_tls else '')


def not_http(said: bytes, where: str) -> str:
    """Return a sentence if what WHERE said is not HTTP, else ''."""
    if said[:1] in (b'\x15', b'\x16'):
        return speaks_tls(where)
    if not said or said[:5] == b'HTTP/'[:len(said)]:
        return ''
    line = printable(said[:60].splitlines()[0].decode('latin-1'))
    return f'{where} does not speak HTTP: it says {line!r}'


PROXY_FAILED = {502, 503, 504, *range(520, 528), 530}   # from 520 on: Cloudflare's


class Words(Failures):
    """What people are told where a server or an app can't be reached, or says something strange."""

    unreachable = staticmethod(explain)

    def no_app(self, target: Target, error: BaseException) -> HopFailed:
        """The same of an app."""
        if no_files_left(error):
            return HopFailed(503, 'the client has too many files and connections open; try again '
                             'soon', f'Retry-After: {RETRY_AFTER}', hop='client',
                             cure='raise the limit of open files (ulimit -n) and start it anew')
        status = 504 if isinstance(error, asyncio.TimeoutError) else 502
        cure = (f'start your app on port {target.port}, or check the port'
                if target.local and target.port else 'start your app, or check its address')
        return HopFailed(status, explain(error, target.text), hop='app', cure=cure)

    def no_response(self, target: Target, said: bytes, silent: bool, error: Exception) -> HopFailed:
        """Why an app gave none: it SAID something else, or was SILENT."""
        where, strange = target.text, not_http(said, target.text)
        if isinstance(error, Overdue):
            return HopFailed(504, f'{where} took too long', hop='app',
                             cure='see what your app is busy with, or give it a longer --timeout')
        if strange:
            return HopFailed(502, strange, hop='app', cure='check the port and the scheme')
        if isinstance(error, BadHttp):
            fault = 'too large' if error.status == 431 else 'malformed'
            return HopFailed(502, f'the answer of {where} is {fault}: {error}', hop='app',
                             cure='ask your app directly, with curl -v')
        return HopFailed(502, unanswered(where, silent and target.scheme == 'http'), hop='app',
                         cure='see the log of your app')

    def no_answer(self, address: ServerAddress, said: bytes, error: Exception) -> LocaltunnelError:
        """The same of a server."""
        strange = not_http(said, str(address))
        if strange or isinstance(error, BadHttp):
            return Refused(502, 'no_upgrade',
                           strange or f'{address} is not a localtunnel server: {error}')
        return Disconnected(unanswered(str(address), address.scheme == 'http'))

    async def refusal(self, connection: Connection, response: Response, address: ServerAddress,
                      release: bool) -> Refused:
        """What the server at ADDRESS says in RESPONSE, in place of a session; RELEASE: as asked.

        Raises what says so if another program answered.
        """
        said = b''
        try:
            connection.timeout = HANDSHAKE_TIMEOUT
            said = await read_whole(body_reader(connection, response.body_length(b'GET')), MAX_HEAD)
            told = json.loads(said)
            if told['error'] == 'released' and not release:
                raise ValueError        # that would be success, and nobody asked for it
            return Refused(response.status, str(told['error']),
                           printable(str(told['message'])[:MAX_TEXT]), bool(told.get('final')))
        except (ValueError, KeyError, TypeError, RecursionError, LocaltunnelError):
            raise self.stranger(address, response, said) from None

    def stranger(self, address: ServerAddress, response: Response, said: bytes) -> LocaltunnelError:
        """What it means that another program's RESPONSE came from ADDRESS; its body was SAID."""
        where, status = str(address), response.status
        ours = response.has(b'localtunnel-failed')      # it took this for a visitor's request
        if status in PROXY_FAILED and not ours:
            return Disconnected(f'a proxy in front of {where} answers {status}: the server behind '
                                'it does not answer')
        why = (f'a proxy in front of {where} does not forward Upgrade.' if ours else
               f'{where} answered {status} instead of opening a session: is it a localtunnel '
               'server? If a proxy stands in front, it must forward Upgrade.') + (
                   ' Cloudflare and Envoy don\'t by default: set the DNS record to "DNS only", or '
                   f'allow the upgrade "{PROTOCOL}"')
        if WANTS_TLS.search(said):
            why = speaks_tls(where)
        elif 300 <= status < 400 and address.scheme == 'http':
            why = f'{where} redirects; try --server https://{address.site}'
        return Refused(status, 'no_upgrade', why)


# ------------------------------------------------------------------------------------------------
# 20. Files
#
# What is kept on disk: where, for whose eyes, who waits for it, and how a file changes so that a
# crash leaves the old one or the new one.  And what a server leaves to the next: its lock, and the
# sockets that listen.
# ------------------------------------------------------------------------------------------------

MOST_IN_A_FILE = 16 * MIB       # of one that is read whole: 100,000 tokens or networks have less


def open_file(path: str, most: float = MOST_IN_A_FILE) -> BinaryIO:
    """Open the file at PATH to read it, and never wait.

    Raises OSError: also for a pipe, and where there are more than MOST bytes.
    """
    wait_not = getattr(os, 'O_NONBLOCK', 0)
    file = open(path, 'rb', opener=lambda name, flags: os.open(name, flags | wait_not))
    state = os.fstat(file.fileno())
    if stat.S_ISREG(state.st_mode) and state.st_size <= most:
        return file
    file.close()
    raise OSError(errno.EINVAL, f'it must be a regular file of at most {most / MIB:.0f} MiB', path)


def write_secret(path: str, data: bytes, like: os.stat_result | None = None) -> None:
    """Write DATA to PATH for this user alone, or those who may read the file that LIKE is of.

    The old file stays until the new one is whole.
    """
    beside = f'{path}.{secrets.token_hex(8)}.new'      # nobody can plant a link there before
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(handle, 'wb') as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
            if os.name == 'posix' and like:
                group = like.st_gid if like.st_mode & 0o070 else -1     # one that counts
                os.fchown(f.fileno(), like.st_uid, group)
                os.fchmod(f.fileno(), stat.S_IMODE(like.st_mode))
            elif os.name == 'posix' and os.geteuid() == 0:      # sudo, and the folder of a service
                folder = os.stat(os.path.dirname(beside) or os.curdir)
                with contextlib.suppress(OSError):      # some containers' root may not
                    os.fchown(f.fileno(), folder.st_uid, folder.st_gid)
        os.replace(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def read_secret(path: str, meaning: str, warn: Callable[[str], None]) -> bytes:
    """What is in PATH, now for this user alone; WARN where others could read it, and of MEANING."""
    with open_file(path) as f:
        if os.name == 'posix' and os.fstat(f.fileno()).st_mode & 0o077:
            could = f'others can read {path}'
            with contextlib.suppress(OSError):      # it is not ours
                os.fchmod(f.fileno(), 0o600)
                could = f'others could read {path} until now'
            warn(f'{could}, and anyone with a copy {meaning}')
        return f.read()


def stamp_of(*paths: str) -> list[tuple[int, int, int]]:
    """Return a fingerprint that changes when a file does; [] if one can't be read."""
    try:
        return [(s.st_mtime_ns, s.st_size, s.st_ino) for s in map(os.stat, paths)]
    except OSError:
        return []


DISK_WITHIN = 5.0               # seconds, before who waits for a disk is told that it hangs


class Disk:
    """What waits for a disk, in a thread: one thing after the other.

    One that hangs holds up nobody for long, and the end of the process not at all.
    """

    def __init__(self) -> None:
        # What is to be done; the first is under way, and while there is one, there is a thread.
        self._jobs: collections.deque[tuple[concurrent.futures.Future[Any], Callable[[], Any]]] = (
            collections.deque())
        self._lock = threading.Lock()
        self._overdue: concurrent.futures.Future[Any] | None = None     # at what it hangs

    @property
    def busy(self) -> bool:
        """True while something is not done."""
        return bool(self._jobs)

    @property
    def hangs(self) -> bool:
        """True while something takes longer than anybody waits for it."""
        return self._overdue is not None and not self._overdue.done()

    def later(self, work: Callable[..., Any], *args: Any) -> concurrent.futures.Future[Any]:
        """Have WORK done in its turn, whether anybody waits for that or not."""
        job: concurrent.futures.Future[Any] = concurrent.futures.Future()
        with self._lock:
            if not self._jobs:      # first: where no thread can be had, nothing waits for one
                threading.Thread(target=self._run, daemon=True).start()
            self._jobs.append((job, functools.partial(work, *args)))
        return job

    def _run(self) -> None:
        while True:
            with self._lock:
                job, work = self._jobs[0]
            if job.set_running_or_notify_cancel():
                try:
                    job.set_result(work())
                except Exception as e:
                    job.set_exception(e)
            with self._lock:
                self._jobs.popleft()
                if not self._jobs:
                    return

    async def do(self, work: Callable[..., Any], *args: Any) -> Any:
        """What WORK returns.  Raises OSError also where the disk hangs; what was begun goes on."""
        if not self.hangs:
            job = self.later(work, *args)
            with contextlib.suppress(asyncio.TimeoutError):     # which cancels what has not begun
                return await asyncio.wait_for(asyncio.wrap_future(job), DISK_WITHIN)
            if not job.done():
                self._overdue = job
        raise OSError(errno.EIO, 'the disk does not answer')


class Source:
    """What a server reads from files, and again when they change; after an error the old holds."""
    what = ''           # it is, for the log

    def changed(self) -> bool:
        """Return True if there is something to read again."""
        return False

    def reload(self) -> str | None:
        """Read it again, and see that it holds; return what is wrong, if anything is."""
        return None


class Sources:
    """Those of a server: looked at now and then, and read again on SIGHUP."""

    def __init__(self, server: Server) -> None:
        self.all: list[Source] = []
        self._server, self._disk = server, Disk()
        self._looking: asyncio.Task[None] | None = None     # whether one has changed
        server.runtime.swept.add(self)

    def sweep(self, now: float, woke_up: bool) -> None:
        """Read again what has changed."""
        if self.all and (self._looking is None or self._looking.done()):
            self._looking = self._server.runtime.spawn(self._look())

    async def _look(self) -> None:
        with contextlib.suppress(OSError):      # the disk hangs
            for source in await self._disk.do(lambda: [s for s in self.all if s.changed()]):
                self._read(source)

    def reload(self) -> None:
        """Read all again."""
        for source in self.all:
            self._read(source)

    def _read(self, source: Source) -> None:
        error = source.reload()
        self._server.counters['reload_errors' if error else 'reloads'] += 1
        self._server.log.note(f'error: {error}' if error else f'{source.what} read again')


LAST_LINES = 1.0                # at the end, for a slow reader to take what was written
LOCK_LOOK, LOCK_LOOKS = 0.05, 200        # between tries to be the only one who changes a file


@contextlib.contextmanager
def alone_in(folder: str) -> Iterator[None]:
    """Change what is in FOLDER while no other command does.  Raises OSError."""
    if sys.platform == 'win32':
        return (yield)          # a folder can't be locked there
    import fcntl
    handle = os.open(folder, os.O_RDONLY)
    try:
        for _ in range(LOCK_LOOKS):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(LOCK_LOOK)
        else:
            raise LocaltunnelError(f'another program is changing {folder}; try again')
        yield
    finally:
        os.close(handle)


def whole_lines(path: str) -> list[bytes]:
    """The lines of the file at PATH with their ends; none where it is missing.  Raises OSError."""
    lines: list[bytes] = []
    with contextlib.suppress(FileNotFoundError), open_file(path) as f:
        lines = f.readlines()
    if lines and not lines[-1].endswith((b'\n', b'\r')):
        lines[-1] += b'\n'
    return lines


def rewrite(path: str, gone: Container[bytes], new: bytes = b'') -> None:
    """Take the lines that are GONE out of the file at PATH, and add NEW.  Raises OSError.

    A link stays one, and the file keeps its owner and mode.
    """
    path = os.path.realpath(path)
    with alone_in(os.path.dirname(path)):
        like = os.stat(path) if os.path.exists(path) else None
        lines = [line for line in whole_lines(path) if line not in gone]
        write_secret(path, b''.join(lines) + new, like)


LOCK_VARIABLE = 'LOCALTUNNEL_LOCK_FD'


def sign_lock(handle: int) -> None:
    """Write into the lock who holds it."""
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, b'%-20d' % os.getpid())


def lock_folder(folder: str) -> int:
    """Keep other servers away from FOLDER, until the descriptor is closed or this process ends.

    A successor inherits the descriptor, and the lock with it.  Raises UsageError.
    """
    given = os.environ.pop(LOCK_VARIABLE, '')
    handle = int(given) if given.isdigit() else os.open(
        os.path.join(folder, 'lock'), os.O_RDWR | os.O_CREAT | getattr(os, 'O_NOFOLLOW', 0), 0o600)
    os.set_inheritable(handle, False)
    try:
        if sys.platform == 'win32':
            import msvcrt
            os.lseek(handle, MIB, os.SEEK_SET)      # what is locked can't be read there
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.lseek(handle, 0, os.SEEK_SET)
        holder = os.read(handle, 20).decode('ascii', 'replace').strip() or '?'
        os.close(handle)
        raise UsageError(f'the state folder {folder} belongs to the server that runs as process '
                         f'{printable(holder)}; end that one, or give this one another folder '
                         'with --state') from None
    sign_lock(handle)
    return handle


def user_folder(variable: str, default: str) -> str:
    """Return our folder in the one that VARIABLE names, else where the system keeps these."""
    usual = {'darwin': '~/Library/Application Support',
             'win32': os.environ.get('LocalAppData', '~')}.get(sys.platform, default)
    return os.path.join(os.environ.get(variable) or os.path.expanduser(usual), 'localtunnel')


def config_path(name: str) -> str:
    """Return where the client keeps the file NAME."""
    return os.path.join(user_folder('XDG_CONFIG_HOME', '~/.config'), name)


def state_folder(given: str | None) -> str:
    """Return the server's folder: the one GIVEN, systemd's, or this user's."""
    return (given or os.environ.get('STATE_DIRECTORY')
            or user_folder('XDG_STATE_HOME', '~/.local/state'))


Sockets = List[socket.socket]


def bind(host: str, port: int) -> list[socket.socket]:
    """Return sockets listening on PORT of HOST, '' for all IPv4 and IPv6.  Raises OSError."""
    hosts = {'': ['0.0.0.0', '::'], 'localhost': ['127.0.0.1', '::1']}.get(host, [host])
    bound: list[socket.socket] = []
    with contextlib.ExitStack() as failed:
        for address in hosts:
            family = socket.AF_INET6 if ':' in address else socket.AF_INET
            try:
                sock = socket.create_server((address, port), family=family, backlog=BACKLOG)
            except OSError as e:
                last = not bound and address == hosts[-1]
                if last or e.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                continue        # this machine has no IPv6, or no IPv6 address
            bound.append(failed.enter_context(sock))
            port = sock.getsockname()[1]
        failed.pop_all()
    return bound


FIRST_PASSED = 3            # SD_LISTEN_FDS_START


def inherited_sockets() -> dict[int, Sockets]:
    """Return the listening sockets that systemd or a predecessor passed, by their local port."""
    count = os.environ.pop('LISTEN_FDS', '')
    owner = os.environ.pop('LISTEN_PID', str(os.getpid()))
    os.environ.pop('LISTEN_FDNAMES', None)
    found: dict[int, Sockets] = {}
    if count.isdigit() and owner == str(os.getpid()):
        for number in range(FIRST_PASSED, FIRST_PASSED + int(count)):
            try:
                sock = socket.socket(fileno=number)
                found.setdefault(sock.getsockname()[1], []).append(sock)
            except (OSError, IndexError) as e:
                raise UsageError(f'LISTEN_FDS={count}: descriptor {number} is not a TCP socket '
                                 f'({plainly(e)})') from e
            sock.set_inheritable(False)
    return found


class Listening:
    """The sockets on which a server listens."""

    def __init__(self, inherited: Mapping[int, Sockets]) -> None:
        self.inherited = dict(inherited)        # what listens already, by port, until it is taken
        self._taken: Sockets = []               # and perhaps closed since

    def take(self, host: str, port: int) -> Sockets:
        """What listens on PORT of HOST: inherited, or bound now.  Raises OSError."""
        sockets = self.inherited.pop(port, None) or bind(host, port)
        self._taken = [sock for sock in self._taken if sock.fileno() >= 0] + sockets
        return sockets

    def at(self, host: str, port: int) -> Sockets:
        """The same; 0 is the next one inherited.  Raises LocaltunnelError."""
        if self.inherited and not port:
            port = next(iter(self.inherited))
        try:
            return self.take(host, port)
        except OSError as e:
            other = 'choose another port with --port, --tls-port, --admin or --mail-port'
            nowhere = 'this machine does not have that address; give --bind one that it has'
            cure = {errno.EACCES: 'ports below 1024 need privileges; run as root, grant it with '
                    f'setcap or systemd (AmbientCapabilities=CAP_NET_BIND_SERVICE), or {other}',
                    errno.EADDRINUSE: f'another program is listening there; stop it, or {other}',
                    errno.EADDRNOTAVAIL: nowhere, socket.EAI_NONAME: nowhere,
                    socket.EAI_AGAIN: nowhere}
            raise LocaltunnelError(f"can't listen on port {port} of {host or 'all addresses'}: "
                                   + cure.get(e.errno or 0, f'{e.strerror}; {other}')) from e

    def all(self) -> Sockets:
        """Those that are open, for a successor."""
        return [sock for sockets in (self._taken, *self.inherited.values()) for sock in sockets
                if sock.fileno() >= 0]


@contextlib.contextmanager
def using(folder: str) -> Iterator[None]:
    """Use the server's FOLDER; where that fails, UsageError says what to do."""
    try:
        yield
    except OSError as e:
        raise UsageError(f"can't use the state folder {folder}: {e.strerror} "
                         f'({e.filename or folder}); name another one with --state') from e


# ------------------------------------------------------------------------------------------------
# 21. Annex
#
# What an annex may do at a client and at a server.  Then what several annexes and the command line
# use: types of options, what commands print, codes, this file itself, who stands in front of a
# server, and ways to ask an app.
# ------------------------------------------------------------------------------------------------

Args = argparse.Namespace       # what was typed, see Options
Add = Callable[..., Any]        # argparse's add_argument

AT_LAST: list[Callable[[], Any]] = []       # called even where the process ends at once


class Carrier:
    """Someone else who brings visitors to the server in this process: `name`, for people."""
    name = ''

    def carry(self, app: App, client: Client, server: Server) -> None:
        """Bring them to SERVER, which stands in front of CLIENT and its APP, while that runs."""


Check = Callable[[], Awaitable[str]]     # says what is right, or raises a Finding


class Finding(LocaltunnelError):
    """TEXT says what is wrong, and CURE what helps; where OK is None, what can't be known."""

    def __init__(self, text: str, cure: str = '', ok: bool | None = False) -> None:
        super().__init__(text)
        self.cure, self.ok = cure, ok


class Annex:
    """Something around the tunnel: its options, and where it plugs in.  This one does nothing.

    Each method is called once, in the order of ANNEXES; what can't be meant raises UsageError.
    """
    title = ''          # of its options in --help
    for_all = False     # True: they are about a client as a whole, not about one tunnel of several

    def client_options(self, add: Add) -> None:
        """Options of `client`."""

    def server_options(self, add: Add) -> None:
        """Options of `server`."""

    def commands(self, add: Callable[..., argparse.ArgumentParser]) -> None:
        """Commands beside client and server, as add(NAME, help=...).

        Each sets the default `run`, which is called with what was typed, and returns the exit code.
        With like='server' it takes the options of that command, too; `typed` has all as words.
        What was typed has functions of part III with it: `as_client` is what `client` would have
        made of it, `remember` keeps the server of a code, `do` runs another command, of those
        `known`, and `checks` are those of all annexes.
        """

    def target(self, args: Args) -> Target | None:
        """What the tunnel leads to, where this annex knows what ARGS mean."""

    def carrier(self, args: Args) -> Carrier | None:
        """Who brings visitors to a server in this process, where ARGS say so."""

    def meant(self, words: Sequence[str], note: Callable[[str], Any]) -> Sequence[str]:
        """WORDS that were not understood, as they were meant; NOTE is told what had to change."""
        return words

    def at_client(self, args: Args, app: App, address: ServerAddress) -> None:
        """Plug in at APP, and on the way to the server at ADDRESS."""

    def hello(self, args: Args, key: bytes) -> dict[str, Any]:
        """Words of the hello of a client, which has KEY."""
        return {}

    def at_any_server(self, server: Server) -> None:
        """Plug in at SERVER, also where it is for a client of this process alone."""

    async def beside(self, args: Args, app: App, watched: Callable[[str], Any]) -> None:
        """Open what stands beside a client of the command line; APP's runtime closes it.

        WATCHED is told the URL where what passes can be seen.
        """

    async def at_server(self, args: Args, server: Server) -> None:
        """Plug in at SERVER, before it listens.

        `args.listening` has the sockets; `args.sources` are read again when they change.
        """

    def checks(self, args: Args) -> Sequence[Check]:
        """What is to be looked at on the machine of a server; each by the name of its function."""
        return []

    async def run(self, args: Args, server: Server) -> None:
        """Run as long as SERVER serves.  Returning ends it: another process serves now."""
        await server.runtime.loop.create_future()


# Types for argparse: they raise ArgumentTypeError or ValueError for what does not fit.

def count(text: str, most: int = 10 ** 9 - 1) -> int:
    """A whole number that is not negative."""
    if not re.fullmatch('[0-9]{1,9}', text) or int(text) > most:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number from 0 to {most}')
    return int(text)


port_number = functools.partial(count, most=65535)


def number(text: str) -> float:
    """A number that is not negative."""
    if not re.fullmatch('[0-9]{1,9}([.][0-9]+)?', text):
        raise argparse.ArgumentTypeError(f'{text!r} is not a number of zero or more')
    return float(text)


def network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """An address, or a network as ADDRESS/BITS."""
    return ipaddress.ip_network(text, strict=False)


def port_range(text: str) -> range:
    """Parse A-B, both included, or A.  Raises ValueError."""
    first, _, last = text.partition('-')
    ports = range(int(first), int(last or first) + 1)
    if not ports or ports[0] < 1 or ports[-1] > 65535:
        raise ValueError(f'{text} is not a range of ports')
    return ports


HOST_NAME = r'(?:[A-Za-z0-9_~:-]{1,63}[.])*[A-Za-z0-9_~:-]{1,63}[.]?'


def split_url(text: str, schemes: Sequence[str]) -> tuple[str, str, int, str]:
    """(scheme, host, port, path with query) of a URL.  Raises UsageError."""
    usual = f'expected a URL like {schemes[0]}://HOST:PORT'
    private = f'{usual}, without user and password'         # which are not repeated
    try:
        parts = urllib.parse.urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as e:
        raise UsageError(private if '@' in text else f'{usual}, with an IPv6 address in brackets, '
                         f'and a port up to 65535, not {text}') from e
    if '@' in parts.netloc:
        raise UsageError(private)
    if (parts.scheme not in schemes or not host or port == 0 or parts.fragment
            or not re.fullmatch(HOST_NAME, host) or re.search(r'[^\x21-\x7e]', text)):
        raise UsageError(f'{usual}, not {text}')
    path = parts.path + ('?' + parts.query if parts.query else '')
    return parts.scheme, host, port or USUAL_PORTS[parts.scheme], path


def server_address(text: str) -> ServerAddress:
    """Where the server is that a user typed: a bare host means https, and http for this machine.

    Raises UsageError.
    """
    if '://' not in text:
        host = text.rpartition(':')[0] if re.search(':[0-9]+$', text) else text
        text = ('http://' if is_loopback(host) else 'https://') + text
    scheme, site, port, path = split_url(text, ('https', 'http'))
    if path not in ('', '/'):
        raise UsageError(f'--server {text} has a path; give only scheme, host and port')
    return ServerAddress(scheme, site.lower().rstrip('.'), port)


TARGET_FORMS = """a target is one of:
  8000                     a port of this machine
  HOST:PORT                a port of another machine; these two fit --tcp
  http://HOST:PORT/PATH    an http server, below a path
  https://HOST:PORT        an https server
  unix:PATH                a Unix socket
  ./FOLDER                 the files in a folder
  echo                     sends each request back"""


def parse_target(text: str) -> Target:
    """A URL, Unix socket, PORT or HOST:PORT that the user typed as TARGET.  Raises UsageError."""
    if re.fullmatch('[0-9]+', text):
        text = 'localhost:' + text
    if '://' in text:
        scheme, host, port, path = split_url(text, ('http', 'https'))
        if '?' in path:
            raise UsageError(f'{text} has a query (?...); a target can only have a path')
        return Target(scheme, host, port, path.rstrip('/'))
    if text.startswith('unix:') and text != 'unix:':
        if not hasattr(socket, 'AF_UNIX'):
            raise UsageError('this system has no Unix sockets; use a port')
        return Target('unix', path=text[5:])
    host, _, number = text.rpartition(':')
    if ':' in host and not re.fullmatch(r'\[[^][]*\]', host):
        raise UsageError(f'write an IPv6 address in brackets, such as [::1]:8000, not {text!r}')
    if not re.fullmatch(HOST_NAME, host.strip('[]')) or not re.fullmatch('[0-9]+', number):
        raise UsageError(f"can't tell what {text!r} is, and there is no folder of that name; "
                         + TARGET_FORMS)
    if not 0 < int(number[:6]) < 65536:
        raise UsageError(f'{number} is not a port; ports are 1 to 65535')
    return Target('http', host.strip('[]').lower(), int(number))


def host_and_port(text: str) -> tuple[str, int]:
    """[HOST:]PORT, on loopback where no host is given."""
    host, _, port = text.rpartition(':')
    host = host.strip('[]') or '127.0.0.1'
    if not re.fullmatch(HOST_NAME, host):
        raise argparse.ArgumentTypeError(f'{printable(host)} is not a host')
    return host, port_number(port)


# What commands say, ask, and write beside others.

def print_line(text: str) -> None:
    """Print TEXT, which a command was asked for: however slow the reader is, nothing is dropped."""
    try:
        print(text, flush=True)
    except OSError:         # the reader went away, or the disk is full; Python would try once more
        os._exit(1)


def ask(prompt: str) -> str:
    """Return what the user types, without an echo; '' without a terminal, or if it is nothing."""
    import getpass
    with warnings.catch_warnings():
        warnings.simplefilter('error', getpass.GetPassWarning)      # it would be seen
        try:
            return getpass.getpass(prompt).strip()
        except (EOFError, getpass.GetPassWarning):
            return ''


def check_token(token: str) -> str:
    """Return TOKEN.  Raises UsageError if it can't travel in a header field."""
    if not re.fullmatch('[\x21-\x7e]+', token):
        raise UsageError('a token consists of printable ASCII characters, without spaces')
    return token


def rfc3339(seconds: float) -> str:
    """Return SECONDS, Unix time, as text for programs."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.isoformat(timespec='milliseconds').replace('+00:00', 'Z')


# What this machine has to give.

MAX_DESCRIPTORS = 1 << 20       # more than one event loop can look after
MOST_BUDGET = 1 * GIB           # of memory for all sessions of a process


def process_budget() -> int:
    """Return the bytes for all receive windows of a process: an eighth of the memory."""
    try:
        memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    except (AttributeError, ValueError, OSError):
        return LEAST_BUDGET         # Windows does not say
    return max(LEAST_BUDGET, min(memory // 8, MOST_BUDGET))


def descriptor_limit() -> int:
    """Raise the limit of open files and sockets as far as it goes; return it."""
    try:
        import resource
    except ImportError:
        return MAX_DESCRIPTORS          # Windows
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]        # macOS may grant less, and say yes


def with_this_limit() -> Callable[[], None] | None:
    """What gives a child, as its `preexec_fn`, the limit of open files that there is now.

    Programs that select() break on a descriptor above 1,023, which a low limit keeps from them.
    """
    try:
        import resource
    except ImportError:
        return None                     # Windows
    return functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE,
                             resource.getrlimit(resource.RLIMIT_NOFILE))


# A code is all that a client needs to come to a server, for --join: a word that a double click
# takes whole, and that no shell changes.  It is "lt1" and then, in base32, a byte of flags, the pin
# (32 bytes) if there is one, HOST:PORT, a zero byte, the token, and some bytes of a hash of these.

CODE = re.compile('lt[1-9][a-z2-7]{16,4000}', re.IGNORECASE)
HAS_PIN, HEX_TOKEN, BY_TLS = 1, 2, 4    # the flags; in bytes, a token of hex digits is half as long
CHECKED = 4                             # bytes of the hash: nobody mistypes a code and meets these


def make_code(address: ServerAddress, token: str = '', pin: str = '') -> str:
    """Return the code for the server at ADDRESS, which asks for TOKEN and shows what PIN is of."""
    packed = re.fullmatch('([0-9a-f]{2})+', token) is not None
    flags = HAS_PIN * bool(pin) | HEX_TOKEN * packed | BY_TLS * (address.scheme == 'https')
    data = (bytes([flags]) + bytes.fromhex(pin) + str(address).partition('://')[2].encode() + b'\0'
            + (bytes.fromhex(token) if packed else token.encode()))
    data += hashlib.sha256(data).digest()[:CHECKED]
    return 'lt1' + base64.b32encode(data).decode().rstrip('=').lower()


def read_code(code: str) -> tuple[str, str, str]:
    """Return the (address, token, pin) of a CODE, as if someone had typed them.

    Raises UsageError, which does not repeat the code: it is a secret.
    """
    code = code.strip().lower()
    if not code.startswith('lt1') and CODE.fullmatch(code):
        raise UsageError('this code is of a later version; get localtunnel.py from its server')
    digits = code[3:].upper()
    try:
        data = base64.b32decode(digits + '=' * (-len(digits) % 8))
        data, check = data[:-CHECKED], data[-CHECKED:]
        if not code.startswith('lt1') or hashlib.sha256(data).digest()[:CHECKED] != check:
            raise ValueError
        pin, rest = (data[1:33], data[33:]) if data[0] & HAS_PIN else (b'', data[1:])
        host, _, token = rest.partition(b'\0')
        scheme = 'https' if data[0] & BY_TLS else 'http'
        return (f'{scheme}://{printable(host.decode())}',
                token.hex() if data[0] & HEX_TOKEN else token.decode(), pin.hex())
    except (ValueError, IndexError) as e:
        raise UsageError('this is not a whole code: a part is missing or mistyped; copy all of it, '
                         'from lt1 to its end') from e


SERVED = 'server.json'          # {"address": URL, "pin": SHA256, "open": bool, "files": [PATHS]}


REACHED_WITHIN = 5.0            # seconds for each wait of a question, where there is no hurry


@contextlib.asynccontextmanager
async def asking(
        dial: Awaitable[Connection], host: str, path: str, *lines: str, body: bytes = b'',
        within: float = 0.0) -> AsyncIterator[tuple[Connection, Response]]:
    """Ask what DIAL reaches for PATH of HOST; each wait takes REACHED_WITHIN, or WITHIN."""
    within = within or REACHED_WITHIN
    connection = await asyncio.wait_for(dial, within)
    try:
        connection.timeout = within
        head = [f'{"POST" if body else "GET"} {path} HTTP/1.1', f'Host: {host}',
                f'User-Agent: localtunnel/{__version__}', *lines,
                *[f'Content-Length: {len(body)}'] * bool(body), '', '']
        await connection.write('\r\n'.join(head).encode() + body)
        yield connection, await read_final(connection, None, within)
    finally:
        connection.abort()


async def read_answer(connection: Connection, response: Response, most: int = MAX_HEAD) -> bytes:
    """The body of RESPONSE, or more than MOST bytes of it."""
    return await read_whole(body_reader(connection, response.body_length(b'GET')), most)


async def ask_whole(dial: Awaitable[Connection], host: str, path: str, *lines: str,
                    most: int = MAX_HEAD, **how: Any) -> tuple[Response, bytes]:
    """The response to what `asking` asks, and its body, or more than MOST bytes of it."""
    async with asking(dial, host, path, *lines, **how) as answer:
        return answer[1], await read_answer(*answer, most)


class Served:
    """Where the server is reached that runs, or ran, with a state folder, and its token files."""

    def __init__(self, folder: str) -> None:
        """Raises UsageError."""
        path = os.path.join(folder, SERVED)
        try:
            with open(path, encoding='ascii') as f:
                served = json.load(f)
            self.address, self.pin = server_address(served['address']), str(served['pin'])
            self.files = [str(name) for name in served['files']]    # the first has new ones
            self.open = bool(served['open'])
            if not re.fullmatch('([0-9a-f]{64})?', self.pin) or not (self.files or self.open):
                raise ValueError('a bad pin, or no token file')
        except FileNotFoundError as e:
            raise UsageError(f'no server has run with the state folder {folder}; start it once, '
                             'or give --state as its log says; for one that was started with '
                             'sudo, type sudo here, too') from e
        except OSError as e:
            raise UsageError(f"can't read {path}: {e.strerror}") from e
        except (ValueError, KeyError, TypeError, UsageError) as e:
            raise UsageError(f'{path} is damaged ({e}); a server that starts writes it anew') from e


# The line that a server changes: nothing but an address stands there.
STAMPED = re.compile(rb"(?m)^STAMPED_SERVER = '[a-z0-9.:/\[\]_~-]*'$")
UNSTAMPED = b"STAMPED_SERVER = ''"


def own_path() -> str:
    """Return the path of this file; '' if it was read from standard input."""
    path = globals().get('__file__') or ''
    return path if os.path.isfile(path) else ''


@functools.lru_cache(maxsize=None)
def own_source() -> list[bytes]:
    """Return this file: what stands before and after the stamp.

    Raises if it was read from a pipe, which can't be read again.
    """
    if own_path():
        with open(own_path(), 'rb') as f:
            source = f.read()
    else:
        sys.stdin.buffer.seek(0)
        source = sys.stdin.buffer.read()
    return STAMPED.split(source, maxsplit=1)


def original() -> bytes:
    """Return this file, as if no server had handed it out.  Raises UsageError."""
    try:
        return UNSTAMPED.join(own_source())
    except (OSError, ValueError, AttributeError) as e:
        raise UsageError('this came through a pipe, so there is no file to read; save it first, '
                         'with curl -O') from e


async def ask_stream(stream: Stream, message: Iterable[bytes]) -> Response:
    """What an app answers on STREAM to a MESSAGE in pieces.  Raises LocaltunnelError.

    What its client says in its stead counts for nothing.
    """
    with contextlib.suppress(StreamReset):      # by an app that has answered already
        for piece in message:
            await stream.write(piece)
        await stream.write_eof()
    response = await read_final(stream, None, NEVER, inside=True)
    with contextlib.suppress(LocaltunnelError, asyncio.TimeoutError):   # its body is for nobody
        body = body_reader(stream, response.body_length(b'POST'))
        await asyncio.wait_for(read_whole(body, MAX_HEAD), LINGER)
    if response.has(b'localtunnel-failed'):
        raise HopFailed(502, 'the app does not answer; try again later')
    return response


def plain_address(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """ADDRESS, as IPv4 if an IPv6 socket has it (::ffff:203.0.113.7).  Raises ValueError."""
    ip = ipaddress.ip_address(address.partition('%')[0])
    return getattr(ip, 'ipv4_mapped', None) or ip


def subnet_of(address: str) -> str:
    """ADDRESS as limits count it: of IPv6 everybody has 2**64 (a /64), so those are one."""
    if ':' not in address or is_loopback(address):
        return address
    ip = plain_address(address)
    return str(ip if ip.version == 4 else ipaddress.ip_network((int(ip) >> 64 << 64, 64)))


async def wait_for(visitor: Visitor, seconds: float,
                   among: set[asyncio.Future[None]] | None = None) -> bool:
    """Let VISITOR wait for SECONDS, AMONG those that may be woken; return whether it was.

    Raises Disconnected where it goes away.
    """
    among = among if among is not None else set()
    visitor.waiting = future = visitor.connection.runtime.loop.create_future()
    among.add(future)
    try:
        await asyncio.wait({future}, timeout=seconds)
    finally:
        among.discard(future)
        visitor.waiting = None
    if future.cancelled():
        raise Disconnected('the visitor went away')
    return future.done()


Networks = Sequence[Union[ipaddress.IPv4Network, ipaddress.IPv6Network]]


def within(address: str, networks: Networks) -> bool:
    """Return True if the IP ADDRESS is in one of NETWORKS."""
    if not networks:
        return False        # asked for each connection, and to parse an address takes long
    try:
        ip = plain_address(address)
    except ValueError:
        return False
    return any(ip in network for network in networks)


MAX_PROXIES = 20                # that one request may have passed (X-Forwarded-For)
FORWARDED_FOR = re.compile(rb'([0-9.]+)(?::[0-9]+)?|\[?([0-9A-Fa-f:.]+)(?:\](?::[0-9]+)?)?')


class Front:
    """Who stands in front of a server, at the addresses of NETWORKS, and brings its visitors."""

    def __init__(self, networks: Networks, url: str = '') -> None:
        """URL is where all visitors come, if that is known."""
        parts = urllib.parse.urlsplit(url)
        self.url, self.scheme, self.host = url, parts.scheme, parts.hostname
        self._networks = networks

    def vouches(self, address: str) -> bool:
        """Return True if one at ADDRESS may say who its visitors are."""
        return within(address, self._networks)

    def look_behind(self, visitor: Visitor, request: Request) -> None:
        """Adopt what the peer of VISITOR says about it in REQUEST."""
        chain = [visitor.peer]
        said = request.get(b'x-forwarded-for').rsplit(b',', MAX_PROXIES)
        for entry in reversed(said[-MAX_PROXIES:]):
            match = FORWARDED_FOR.fullmatch(entry.strip())
            address = (match.group(1) or match.group(2)).decode() if match else ''
            if not is_address(address):
                break           # nobody vouches for what stands before
            chain.insert(0, address)
        outside = [a for a in chain if not self.vouches(a)]
        visitor.address = outside[-1] if outside else chain[0]
        proto = request.fields.get(b'x-forwarded-proto', b'')
        visitor.scheme = proto.decode() if proto in (b'http', b'https') else 'http'
        host = request.fields.get(b'x-forwarded-host', b'')
        visitor.host = host if _HOST.fullmatch(host) else b''
        visitor.came_by(chain)


async def ask_app(server: Server, name: str, visitor: Visitor,
                  message: Iterable[bytes]) -> Response:
    """What the app of NAME answers to a request of SERVER itself, whose MESSAGE comes in pieces.

    It is made for VISITOR, who needs no password: the client wants it.  Raises HopFailed.
    """
    tunnel = server.tunnels.get(name)
    if server.tunnels.bars:
        server.tunnels.bars.check_visitor(name, visitor.address)
    if tunnel:
        server.limits.check_rate(tunnel)
    stream, _ = (server.tunnels.open_stream(name, visitor)
                 or await server.tunnels.waits.for_stream(name, visitor))
    visitor.begin(stream)
    try:
        return await ask_stream(stream, message)
    except (StreamReset, BadHttp, Incomplete, Overdue) as e:
        raise server.pages.no_answer(name, e) from e
    finally:
        visitor.stream = None
        stream.close()


def leads_out(path: bytes) -> bool:
    """Return True if dot segments lead PATH above its beginning, in some app's reading.

    Apps decode %2e and %2f, take backslashes for slashes, drop `;` and what follows, merge slashes.
    """
    depth, path = 0, urllib.parse.unquote_to_bytes(path.partition(b'?')[0])
    for segment in re.findall(rb'[^/\\]+', re.sub(rb'[;?#\0][^/\\]*', b'', path)):
        segment = segment.strip()
        depth += -1 if segment == b'..' else segment not in (b'', b'.')
        if depth < 0:
            return True
    return False


def dial_inside(runtime: Runtime, serve: Callable[[Connection], Coroutine[Any, Any, None]]
                ) -> Callable[[Target], Awaitable[Connection]]:
    """What connects to an app in this process, which has SERVE run for each connection."""
    async def dial(target: Target) -> Connection:
        ours, theirs = socket.socketpair()
        await runtime.loop.create_connection(lambda: Connection(runtime, serve), sock=theirs)
        _, connection = await runtime.loop.create_connection(lambda: Connection(runtime), sock=ours)
        return connection
    return dial


# ------------------------------------------------------------------------------------------------
# 22. TLS
#
# What a client checks; what a server shows, and asks of those who come without it.
# ------------------------------------------------------------------------------------------------

URL_CHARACTERS = "%/?:@!$&'()*+,;=-._~[]"      # those that stand for themselves, RFC 3986


def covers(names: Sequence[str], host: str) -> bool:
    """Return True if a certificate for NAMES is one for HOST: addresses are compared as such."""
    host = host.strip('[].').lower()
    if ':' in host and is_address(host):
        host = str(ipaddress.ip_address(host))
    return host in names or '*.' + host.partition('.')[2] in names


def read_date(text: Any) -> float:
    """Return the Unix seconds of a date in a header field (RFC 9110 5.6.7).  Raises ValueError."""
    import email.utils
    try:
        return float(email.utils.mktime_tz(email.utils.parsedate_tz(text)))
    except (TypeError, IndexError, OverflowError) as e:
        raise ValueError(f'{text!r} is not a date') from e


OPENSSL_PATIENCE = 20.0         # seconds for the openssl program; what is asked takes milliseconds
CURVE = '-pkeyopt', 'ec_paramgen_curve:P-256'       # of the keys that it makes


def openssl(*words: str, given: bytes = b'') -> bytes:
    """What the openssl program makes of GIVEN.  Raises LocaltunnelError."""
    import subprocess
    try:
        done = subprocess.run(['openssl', *words], input=given, capture_output=True,
                              timeout=OPENSSL_PATIENCE)
    except (OSError, subprocess.SubprocessError) as e:
        raise LocaltunnelError(f"the openssl program can't be run ({plainly(e)}); install it, or "
                               'see why: it makes the keys and signatures') from e
    if done.returncode:
        why = (done.stderr.decode(errors='replace').strip().splitlines() or ['no reason'])[0]
        raise LocaltunnelError(f'openssl {words[0]} failed: {why}')
    return done.stdout


def server_context() -> ssl.SSLContext:
    """What shows no certificate yet."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(['http/1.1'])
    return context


def certified(cert: str, key: str, opened: Callable[[str], IO[Any]] = open) -> ssl.SSLContext:
    """What shows the certificate in the file CERT; both can be OPENED.  Raises UsageError."""
    context = server_context()
    try:
        for path in cert, key:
            opened(path).close()        # OpenSSL does not say which one is missing
        context.load_cert_chain(cert, key)
    except ssl.SSLError as e:
        why = ('they do not belong together' if e.reason == 'KEY_VALUES_MISMATCH' else
               'it takes two files in PEM form')
        raise UsageError(f"can't use the certificate {cert} with the key {key}: {why}") from e
    except OSError as e:
        raise UsageError(f"can't read {e.filename or cert}: {e.strerror}") from e
    return context


MACOS_AUTHORITIES = '/etc/ssl/cert.pem'     # python.org's Python has none until its script has run


def client_tls(ca: str | None = None, check: bool = True) -> ssl.SSLContext:
    """Return a context that checks a server by the system's authorities and the file CA, or not."""
    context = ssl.create_default_context() if check else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if not check:               # to read all authorities takes tens of milliseconds
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    elif not context.cert_store_stats()['x509_ca'] and os.path.exists(MACOS_AUTHORITIES):
        context.load_verify_locations(MACOS_AUTHORITIES)
    if ca:
        try:
            context.load_verify_locations(ca)
        except OSError as e:
            why = 'no certificate in PEM form' if isinstance(e, ssl.SSLError) else e.strerror
            raise UsageError(f"can't use {ca}: {why}") from e
    return context


def tls_to(place: ServerAddress | Target, ca: str | None = None,
           check: bool = True) -> ssl.SSLContext | None:
    """Return the context for connections to PLACE; None if they go without TLS."""
    return client_tls(ca, check) if place.scheme == 'https' else None


# Of OpenSSL's verify flags: what is in the store is trusted without its authority; at any time.
PARTIAL_CHAIN, NO_CHECK_TIME = 0x80000, 0x200000


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext) -> ssl.SSLObject:
    """Let CLIENT visit SERVER, in memory; return the client's end.  Raises SSLError."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    near, far = client.wrap_bio(back, there), server.wrap_bio(there, back, server_side=True)
    for end in (near, far) * 4:         # a client that guessed the wrong curve says hello again
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
    return near


Validity = Tuple[float, float, List[str]]       # since, until (in Unix seconds), for which names
UNKNOWN: Validity = (0.0, 0.0, [])


def validity(facts: Any) -> Validity:
    """That of a certificate, from its FACTS as Python reads them."""
    return (ssl.cert_time_to_seconds(facts['notBefore']),
            ssl.cert_time_to_seconds(facts['notAfter']),
            [name.lower() if kind == 'DNS' else str(ipaddress.ip_address(name.strip()))
             for kind, name in facts.get('subjectAltName', ())
             if kind == 'DNS' or kind == 'IP Address' and is_address(name.strip())])


def shown_by(server: ssl.SSLContext) -> tuple[bytes, Any]:
    """The certificate that SERVER shows, and its facts as Python reads them.  Raises SSLError."""
    client = client_tls(check=False)
    shown: Any = shake_hands(client, server).getpeercert(binary_form=True)
    client.load_verify_locations(cadata=shown)      # Python reads to us only what was checked
    client.verify_mode = ssl.CERT_REQUIRED
    client.verify_flags |= PARTIAL_CHAIN | NO_CHECK_TIME
    return shown, shake_hands(client, server).getpeercert()


def validity_of(server: ssl.SSLContext) -> Validity:
    """That of the certificate that SERVER shows; UNKNOWN where it is not one for servers."""
    try:
        return validity(shown_by(server)[1])
    except ssl.SSLError:
        return UNKNOWN


def pin_of(server: ssl.SSLContext) -> str:
    """The SHA256 of the certificate that SERVER shows, if that is of nobody but itself."""
    with contextlib.suppress(ssl.SSLError):
        shown, facts = shown_by(server)
        if facts['issuer'] == facts['subject']:
            return digest_of(shown)
    return ''


OTHER_NAME = 62, 64             # verify_code of OpenSSL: for another host, for another address


async def certificate_names(tls: ssl.SSLContext,
                            dial: Callable[[], Awaitable[Connection]]) -> str:
    """The names that a server is certified for, where it was not for the one that DIAL asks for."""
    tls.check_hostname = False      # all the rest is checked, and nothing is said to it
    try:
        connection = await dial()
    finally:
        tls.check_hostname = True
    shown = connection.transport.get_extra_info('peercert')
    connection.abort()
    names = ', '.join(name for _, name in shown.get('subjectAltName', ()))
    return f' ({printable(names[:MAX_TEXT])}); give one of these to --server' if names else ''


async def dial_server(runtime: Runtime, address: ServerAddress, tls: ssl.SSLContext | None,
                      pin: str, timeout: float) -> Connection:
    """A connection to the server at ADDRESS; TLS checks its certificate, and so does PIN, a SHA256.

    Raises Refused.
    """
    if tls and address.sni:         # what goes by it can tell sessions from visitors, too
        tls.set_alpn_protocols([PROTOCOL, 'http/1.1'])

    async def dial(host: str) -> Connection:
        sock = await address.route(host, address.port) if address.route else None
        return await connect(runtime, host, address.port, tls, address.sni or address.site, sock)
    reach = functools.partial(first_to_answer, addresses(address.site), timeout, dial)
    try:
        connection = await reach()
    except ssl.SSLError as e:
        fault = tls_fault(e, str(address), 'name the authority with --ca FILE, or paste the '
                          'command that the server printed, with --join or --pin')
        if not fault:
            raise
        if tls and getattr(e, 'verify_code', 0) in OTHER_NAME:
            fault += await certificate_names(tls, reach)
        raise Refused(495, 'tls', fault) from e
    if address.sni and tls and tls.check_hostname and not covers(   # who has that name may have one
            validity(connection.transport.get_extra_info('peercert'))[2], address.site):
        connection.abort()
        raise Refused(495, 'tls', f'the certificate of {address} is for {address.sni} alone')
    if pin:
        shown = digest_of(
            connection.transport.get_extra_info('ssl_object').getpeercert(binary_form=True))
        if not hmac.compare_digest(shown, pin):
            connection.abort()
            raise Refused(495, 'tls', f'the certificate of {address} does not match the pin: its '
                          f'SHA256 is {shown}; if its operator has made a new one, ask for a new '
                          'code for --join')
    return connection


TLS_RECORD = 16 * KIB + 256     # at most, with what encryption adds


def share_tls_buffer(buffer: memoryview) -> None:
    """Let asyncio's TLS read all sockets of this process, which has one event loop, into BUFFER.

    Each connection has its own 256 KiB otherwise, since Python 3.11, though what is in them is
    decrypted before the read returns; and with 32 KiB an upload takes a third more CPU time.
    """
    room = buffer[TLS_RECORD:]      # so the clear text of one read, and of a record begun, fits too

    def get_buffer(self: Any, sizehint: int) -> memoryview:
        self._ssl_buffer_view = room        # of which buffer_updated takes what was read
        return room
    protocol: Any = asyncio.sslproto.SSLProtocol
    updated = getattr(protocol, 'buffer_updated', None)         # before, nothing is kept
    if updated and '_ssl_buffer_view' in updated.__code__.co_names:     # of a later one who knows
        protocol.max_size, protocol.get_buffer = 1, get_buffer


class Tls(Source):
    """How a server speaks TLS: `context` hands each connection over to what was loaded last."""
    what = 'certificate'

    def __init__(self, port: int = 0, pin: str = '') -> None:
        self.port, self.pin = port, pin     # where; the SHA256 of what only clients are shown
        self.context, self.validity = server_context(), UNKNOWN
        self.context.sni_callback = self._choose
        self._current: ssl.SSLContext | None = None

    def load(self, cert: str, key: str, opened: Callable[[str], IO[Any]] = open) -> None:
        """Show what is in these files from now on.  Raises UsageError, and the old one stays."""
        self._current = certified(cert, key, opened)
        self.validity = validity_of(self._current)

    def _choose(self, connection: Any, name: str | None, context: Any) -> int | None:
        """Called in each handshake, with the NAME that the visitor asks for."""
        if self._current is None:
            return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
        connection.context = self._current
        return None

    def shows(self, host: str) -> bool:
        """Return True if visitors of HOST are shown a certificate for it: http sends them there."""
        return self.port != 0 and not self.pin

    def check_visitor(self, request: Request, host: str) -> None:
        """Raises HopFailed, which sends one who asks HOST by http to https, if that can be."""
        if request.target != b'*' and self.shows(host):
            where = (f'https://{authority("https", host.strip("[]"), self.port)}'
                     + urllib.parse.quote(request.target, safe=URL_CHARACTERS))
            raise HopFailed(308, f'this site is at {where}', f'Location: {where}')

    def check_session(self, visitor: Visitor, domain: str) -> None:
        """Raises Refused if VISITOR, a client, came by http, and can come by https to DOMAIN."""
        if (visitor.scheme == 'http' and not visitor.front and not is_loopback(visitor.peer)
                and (self.pin or self.shows(domain))):
            raise Refused(403, 'https', 'this server takes sessions by https alone, since tokens '
                          'and proofs are secrets: say --server https://HOST, or ask its operator '
                          'for a code, for --join')


HANDSHAKES = 4                  # times as many of TLS are under way as are accepted together
CROWDED_HANDSHAKE = 1.0         # for a visitor's TLS handshake while too many are under way


class TlsDoor(GuardedDoor):
    """SOCK, where visitors of SERVER come in by TLS: handshakes that stall keep nobody out."""

    def __init__(self, server: Server, sock: socket.socket, context: ssl.SSLContext) -> None:
        self._server, self._sock, self._context = server, sock, context
        self.busy: dict[socket.socket, float] = {}      # handshakes, since when; the oldest first
        self._accepting = server.runtime.spawn(self._accept())
        self._accepting.add_done_callback(lambda _: sock.close())
        server.doors.guarded.append(self)

    async def close(self) -> None:
        await end_task(self._accepting)

    async def _accept(self) -> None:
        """Accept connections; of too many handshakes the slow ones are cut off."""
        runtime, shaking, fails = self._server.runtime, self.busy, False
        self._sock.setblocking(False)
        while True:
            while len(shaking) >= HANDSHAKES * self._server.doors.together:     # a second is slow
                for old, since in tuple(shaking.items()):
                    if runtime.now() - since >= CROWDED_HANDSHAKE:
                        with contextlib.suppress(OSError):
                            old.shutdown(socket.SHUT_RDWR)
                await asyncio.sleep(LOOK_AGAIN)
            try:
                accepted, _ = await runtime.loop.sock_accept(self._sock)
                fails = False
            except OSError as e:
                if not fails:
                    self._server.log.note(f"error: can't accept connections: {plainly(e)}; trying "
                                          'again')
                fails = True
                await asyncio.sleep(SWEEP)
                continue
            shaking[accepted] = runtime.now()
            runtime.spawn(self._shake_hands(accepted))

    async def _shake_hands(self, accepted: socket.socket) -> None:
        runtime = self._server.runtime
        try:
            await runtime.loop.connect_accepted_socket(
                lambda: Connection(runtime, self._server.serve), accepted, ssl=self._context,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT)
        except OSError:
            self._server.counters['handshakes_failed'] += 1
        finally:
            del self.busy[accepted]


# ------------------------------------------------------------------------------------------------
# 23. Tokens and leases
#
# What a server asks of who wants a tunnel: which token allows what, which names may be chosen, and
# whose they are.  Callers bring `now`, in Unix seconds.
#
# A chosen name is leased to the first who comes for it, until a year after its last use.  Secrets
# are compared in constant time and kept as hashes.
# ------------------------------------------------------------------------------------------------

MAX_TUNNELS_OF_TOKEN = 1000     # unless its line says tunnels=N
MAX_LEASES = 20                 # chosen names of an owner; also new ones a day without a token
MAX_LEASES_OF_TOKEN = 1000      # of a token: its clients can make up owners if it names no user
MAX_LEASES_IN_ALL = 10000
DAY = 86400

NAME = re.compile(r'[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?')
RESERVED = frozenset(('www', 'admin', 'api', 'mail', 'localtunnel'))


def check_name(name: str) -> None:
    """Raise Refused unless a client may ask for NAME."""
    if name.startswith('xn--'):
        raise Refused(403, 'bad_name', f'{name!r} is not a valid name: browsers show names that '
                      'begin with xn-- in other letters, which may look like another name')
    if not NAME.fullmatch(name):
        raise Refused(403, 'bad_name', f'{name!r} is not a valid name; use up to 63 letters '
                      'a-z, digits and hyphens, without a hyphen at either end')
    if name in RESERVED:
        raise Refused(403, 'reserved', f'the name {name} is reserved; choose another name')
    if is_derived(name):
        raise Refused(403, 'bad_name', f'{name} looks like an automatic name; choose another '
                      'name, or leave out --name to get yours')


class Grant(NamedTuple):
    """What one token allows."""
    user: str = ''          # whose it is, where that is known
    digest: str = ''        # of the token; '' for who comes without one
    names: Sequence[str] = ('*',)       # patterns for chosen names
    ports: Sequence[int] = range(65536)     # for raw TCP
    tunnels: int = MAX_TUNNELS_OF_TOKEN     # at once
    since: float = 0.0      # Unix seconds
    expires: float = NEVER


class Tokens:
    """The tokens that open tunnels at a server, and what each allows."""

    def __init__(self, tokens: Iterable[str] = (), open: bool = False) -> None:
        """OPEN lets anyone in."""
        self.open = open
        self.seen: dict[str, float] = {}        # when a token came last, by its digest
        self.take([Grant(digest=digest_of(token)) for token in tokens])

    def take(self, grants: Sequence[Grant]) -> None:
        """Take GRANTS, and no others, from now on."""
        self.grants = grants
        self._until: dict[str, float] = {}      # when the last token of a digest, or user, expires
        for grant in grants:
            for key in grant.digest, f'user:{grant.user}':
                self._until[key] = max(grant.expires, self._until.get(key, 0.0))

    def find(self, token: str, now: float) -> Grant | None:
        """Return what TOKEN allows, None if it is wrong; in the same time for all tokens."""
        digest, found = digest_of(token), None
        for grant in self.grants:
            if hmac.compare_digest(grant.digest, digest) and now < grant.expires:
                found = grant
        if found:
            self.seen[found.digest] = now
        return found or (Grant() if self.open else None)

    def holds(self, owner: str, digest: str, now: float) -> bool:
        """Return True if the token with DIGEST, or one of the user OWNER, is still valid."""
        return self.open or now < max(self._until.get(owner, 0.0), self._until.get(digest, 0.0))


class Lease(NamedTuple):
    """The right of one owner to one name."""
    owner: str
    token: str              # the digest of the token that came with the claim; '' without one
    used: int               # Unix seconds, to the day
    facts: Mapping[str, str] = {}       # of annexes, which give each of theirs a name and a bound


Changes = Dict[str, Optional[Lease]]        # by name; None: the lease ends

LEASE_LOOK = 60                 # seconds between searches for leases that have ended, when full
LEASE_SECONDS = 365 * DAY       # a chosen name on an open server, after its last use


class Leases:
    """Which chosen name (or tcp:PORT) belongs to whom: a book, as old as the process.

    A change is asked for (`claim`, `free`, `note`), which changes nothing yet; `save`
    has it kept and then makes it.  One change after the other: what was looked at stays so.
    """

    def __init__(self, tokens: Tokens) -> None:
        # A seam: who keeps changes, before they are made.  Raises Refused where that fails.
        self.keepers: list[Callable[[Changes], Awaitable[None]]] = []
        self.in_use: Callable[[str], bool] = lambda name: False     # a seam: is NAME served
        self.by_name: dict[str, Lease] = {}     # to look at; `make` alone changes it
        self.tokens = tokens
        self._strangers: dict[str, int] = collections.Counter()     # their new leases, by subnet
        self._look_at = 0.0         # when leases that have ended are looked for again

    async def save(self, changes: Changes) -> bool:
        """Keep CHANGES and make them; return whether there was anything.  Raises Refused."""
        if changes:
            for keep in self.keepers:
                await keep(changes)
            self.make(changes)
        return bool(changes)

    def make(self, changes: Changes) -> None:
        """Make CHANGES, which are kept."""
        for name, lease in changes.items():
            if lease:
                self.by_name[name] = lease
            else:
                self.by_name.pop(name, None)

    def renew(self, name: str, now: float) -> None:
        """Let the lease of NAME not end while it is in use: for a year, or the clock has jumped.

        To the day before, so that the next claim is kept on disk.
        """
        lease = self.by_name.get(name)
        if lease and now - lease.used >= LEASE_SECONDS and self.in_use(name):
            self.make({name: lease._replace(used=int(now) - DAY)})

    def owner(self, name: str, now: float) -> str | None:
        """Return the owner of NAME, or None."""
        self.renew(name, now)
        lease = self.by_name.get(name)
        return lease.owner if lease and self.holds(lease, now) else None

    def holds(self, lease: Lease, now: float) -> bool:
        """Return True if LEASE has not come to its end."""
        return (now - lease.used < LEASE_SECONDS
                and self.tokens.holds(lease.owner, lease.token, now))

    def check_limits(self, owner: str, token: str, now: float) -> None:
        """Raise Refused if OWNER, whose token has the digest TOKEN, may not have another name."""
        leases = self.by_name.values()
        if sum(lease.owner == owner and self.holds(lease, now) for lease in leases) >= MAX_LEASES:
            raise Refused(403, 'too_many_names', f'you already have {MAX_LEASES} names; give one '
                          'back with: client TARGET --name NAME --release')
        if token and sum(lease.token == token for lease in leases) >= MAX_LEASES_OF_TOKEN:
            raise Refused(403, 'too_many_names', f'your token has {MAX_LEASES_OF_TOKEN} names '
                          'already; give one back')

    def claim(self, name: str, owner: str, token: str, now: float) -> Changes:
        """Return the change that leases NAME to OWNER, whose token has the digest TOKEN.

        Another owner loses it.  Raises Refused.
        """
        known, ended = self.by_name.get(name), []
        stays = self.owner(name, now) == owner
        if known and stays and known.token == token and now - known.used < DAY:
            return {}       # a date within the last day is new enough
        if not stays:
            self.check_limits(owner, token, now)
        if not known and len(self.by_name) >= MAX_LEASES_IN_ALL:
            if now >= self._look_at:        # all are looked at: not for each who asks
                self._look_at = now + LEASE_LOOK
                ended = [n for n in self.by_name if not self.owner(n, now)]
            if len(self.by_name) - len(ended) >= MAX_LEASES_IN_ALL:
                raise Refused(503, 'full', f'all {MAX_LEASES_IN_ALL} names of the server are taken')
        facts = known.facts if known and stays else {}
        return {**dict.fromkeys(ended), name: Lease(owner, token, int(now), facts)}

    def note(self, name: str, **facts: str) -> Changes:
        """Return the change that adds FACTS to the lease of NAME, until another owner has it.

        '' takes one away.
        """
        lease = self.by_name.get(name)
        now = {word: fact for word, fact in {**(lease.facts if lease else {}), **facts}.items()
               if fact}
        return {name: lease._replace(facts=now)} if lease and now != lease.facts else {}

    def check_fact(self, word: str, read: Callable[[str], Any], warn: Callable[[str], Any]) -> None:
        """Leave the fact WORD out where READ raises ValueError, and WARN: people mend files."""
        for name, lease in tuple(self.by_name.items()):
            try:
                read(lease.facts.get(word, '0'))
            except ValueError:
                self.make(self.note(name, **{word: ''}))
                warn(f'warning: the fact {word} in the lease of {name} is damaged, and left out')

    def free(self, name: str) -> Changes:
        """Return the change that takes NAME back from its owner; none where nobody has it."""
        return {name: None} if name in self.by_name else {}

    # For clients.

    def check_stranger(self, asked: Candidate) -> str:
        """Where ASKED is counted, without a token: owners can be made up, but not addresses.

        Raises Refused where it has taken enough new names.
        """
        address = asked.visitor.address
        subnet = '' if asked.grant.digest or is_loopback(address) else subnet_of(address)
        if subnet and self._strangers[subnet] >= MAX_LEASES:
            raise Refused(429, 'too_many_names', f'{address} has taken {MAX_LEASES} '
                          'new names today; take one of those, or come again tomorrow')
        return subnet

    async def lease(self, name: str, owner: str, asked: Candidate) -> None:
        """Lease NAME to OWNER, who is ASKED.  Raises Refused and Disconnected."""
        now = time.time()
        subnet = self.check_stranger(asked) if self.owner(name, now) != owner else ''
        await self.save(self.claim(name, owner, asked.grant.digest, now))
        if subnet:
            if not self._strangers:
                asyncio.get_running_loop().call_later(DAY, self._strangers.clear)
            self._strangers[subnet] += 1
        asked.visitor.connection.check()      # it may have left meanwhile

    async def give(self, asked: Candidate, notes: Mapping[str, str]) -> None:
        """Lease the name of ASKED, if it was chosen, and add NOTES.

        Raises Refused and Disconnected.
        """
        if asked.hello.name is not None:
            await self.lease(asked.name, asked.owner, asked)
        elif any(notes.values()):       # a derived name is its key's, whatever token comes with it
            await self.lease(asked.name, asked.prover, asked)
        await self.save(self.note(asked.name, **notes))


# ------------------------------------------------------------------------------------------------
# 24. Limits
#
# What keeps one client from taking all, or from guessing tokens; and what it may have beside its
# tunnel.  And a server with a place for one.
# ------------------------------------------------------------------------------------------------

MAX_TUNNELS = 10000             # of a server (--max-tunnels)
MAX_MEMBERS = 64                # sessions of one tunnel (--share)
WRONG_TOKEN = 0.5               # after a wrong token the next one from its address waits
MOST_WRONG_TOKEN = 3.0          # in line with others, or it is a 429: FIRST_ATTEMPTS last longer


class OnlyOne:
    """A server with a place for one http tunnel: any Host of this machine leads to it."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def check(self, tunnel: Tunnel) -> None:
        """Raises Refused where another one than TUNNEL is there."""
        if any(other.kind == 'http' and other.members and other.name != tunnel.name
               for other in self._server.tunnels):
            raise Refused(409, 'name_taken', 'this server has a place for one http tunnel, and '
                          'another one is there; end that one first, or take --tcp')

    def find(self, host: str) -> str:
        """The name of the tunnel, for visitors of HOST; '' without one.  Raises HopFailed."""
        # A stranger's name that leads here would let its pages read the app (DNS rebinding).
        front = self._server.visitors.front
        if not (is_address(host) or is_loopback(host) or front and host == front.host):
            raise HopFailed(403, f'this server is visited as {self._server.domain} or by IP '
                            f'address, not as {host or "no host"}')
        mine = min((tunnel for tunnel in self._server.tunnels if tunnel.kind == 'http'),
                   key=lambda tunnel: (not tunnel.members, -tunnel.left_at), default=None)
        return mine.name if mine else ''


class Limits:
    """How much a client may have: tunnels, requests, guesses, and things beside."""

    def __init__(self, runtime: Runtime, most: int = MAX_TUNNELS, rate: float = 0.0) -> None:
        """MOST tunnels in all; RATE in requests a second of a tunnel, 0 for any.  Both may change
        at any time.
        """
        # A seam: what clients may want beside the tunnel, by the option that the server was given;
        # each checks what a client says of it, and raises ValueError and TypeError.  It returns
        # what is noted with the client's lease; if that is not '', a derived name has one, too.
        self.offers: dict[str, Callable[[Any], str]] = {}
        # A seam: what makes a gate of a rule, by the word of a hello that has it.  Raises
        # ValueError and the like.
        self.gates: dict[str, Callable[[Any], Gate]] = {}
        self.wrong_tokens = 0
        self.most, self.rate, self._runtime = most, rate, runtime
        self._wrong: dict[str, float] = {}      # until when a subnet waits for its wrong tokens
        runtime.swept.add(self)

    def sweep(self, now: float, woke_up: bool) -> None:
        """Forget old guesses."""
        if self._wrong:
            self._wrong = {subnet: at for subnet, at in self._wrong.items() if at > now}

    async def grant(self, tokens: Tokens, visitor: Visitor, request: Request) -> Grant:
        """What the token allows with which VISITOR, a client, comes.  Raises Refused.

        After a wrong one the next from that address waits before it is looked at, so that a guess
        takes its time, however it is sent.
        """
        scheme, _, given = request.get(b'authorization').partition(b' ')
        token = given.strip().decode('latin-1') if scheme.lower() == b'bearer' else ''
        subnet = subnet_of(visitor.address)
        if token:
            await self._take_turn(visitor, subnet)
        grant = tokens.find(token, time.time())
        if grant is None:
            if token:
                self.wrong_tokens += 1
                until = self._runtime.now() + WRONG_TOKEN
                self._wrong[subnet] = max(self._wrong.get(subnet, 0.0), until)
            raise Refused(401, 'token', 'the server does not know this token, or it has expired; '
                          'ask its operator for a new code, for --join' if token else
                          'the server needs a token; ask its operator for a code, for --join '
                          'or LOCALTUNNEL_JOIN')
        return grant

    async def _take_turn(self, visitor: Visitor, subnet: str) -> None:
        now = self._runtime.now()
        turn = self._wrong.get(subnet, now)
        if turn > now + MOST_WRONG_TOKEN:
            raise Refused(429, 'slow_down', f'wrong tokens came from {visitor.address}; try '
                          f'again in {int(turn - now) + 1} seconds')
        if turn > now:
            self._wrong[subnet] = turn + WRONG_TOKEN
            await wait_for(visitor, turn - now)

    def gates_of(self, rules: Mapping[str, Any]) -> list[Gate]:
        """Those that RULES ask for.  Raises what `gates` raise, and Refused for other rules."""
        for word in rules:
            if word not in self.gates:
                raise Refused(403, 'not_offered', "this server can't keep visitors out by "
                              f'--{word}; ask its operator')
        return [self.gates[word](rule) for word, rule in rules.items()]

    @staticmethod
    def check_name(name: str, grant: Grant) -> None:
        """Raises Refused where a client with GRANT may not choose NAME."""
        check_name(name)
        if not any(fnmatch.fnmatchcase(name, glob) for glob in grant.names):
            raise Refused(403, 'bad_name', f'your token does not allow the name {name}, but '
                          + ' and '.join(grant.names))

    @staticmethod
    def holder(asked: Candidate) -> str:
        """Whose tunnels are counted together: of the token of ASKED, or else of its address."""
        return asked.grant.digest or subnet_of(asked.visitor.address)

    def check_place(self, asked: Candidate, tunnels: Tunnels) -> None:
        """Raises Refused where there is no place among TUNNELS for ASKED, or not as it wants it."""
        hello, tunnel, most = asked.hello, asked.tunnel, asked.grant.tunnels
        self._check_wants(hello)
        if tunnels.only and hello.kind == 'http':
            tunnels.only.check(tunnel)
        served, holder = tunnels.served, self.holder(asked)
        goes = tunnel.replaced_by(hello)        # their places are free
        if len(tunnel.members) - len(goes) >= MAX_MEMBERS:
            raise Refused(429, 'too_many', f'{tunnel.name} already has {MAX_MEMBERS} clients; '
                          'stop one first')
        has = served.get(holder, 0) - sum(old.holder == holder for old in goes)
        if has >= most and not is_loopback(holder):
            raise Refused(429, 'too_many', 'you have as many tunnels as you may, which is '
                          f'{most}, each client of --share counted; end another one first')
        if sum(served.values()) - len(goes) >= self.most:
            raise Refused(429, 'too_many', f'the server is full: it has {self.most} tunnels; '
                          'try again later')

    def check_rate(self, tunnel: Tunnel) -> None:
        """Let one more request come to TUNNEL; a second's worth may come at once.

        Raises HopFailed.
        """
        now, rate = self._runtime.now(), self.rate
        left, since = tunnel.allowance
        left = min(max(1.0, rate), left + (now - since) * rate)
        tunnel.allowance = left - 1 if left >= 1 else left, now
        if rate and left < 1:
            raise HopFailed(429, f'{tunnel.name} gets too many requests a second',
                            'Retry-After: 1', cure='the operator of the server can raise --rate')

    def _check_wants(self, hello: Hello) -> None:
        """Raises Refused where HELLO wants what this server does not offer."""
        for option, said in hello.wants.items():
            if option not in self.offers:
                if isinstance(said, dict) and said.get('optional'):
                    continue        # the welcome will not speak of it
                raise Refused(403, 'not_offered', f'this server was started without --{option}, '
                              'so a client can\'t have it either; ask its operator')
            try:
                self.offers[option](said)
            except (ValueError, TypeError) as e:
                raise Refused(400, 'bad_hello', f'--{option} is malformed: {e}') from e

    def notes_of(self, hello: Hello) -> dict[str, str]:
        """What is noted with the lease of HELLO, by option; if anything, who may visit, too."""
        if hello.kind != 'http':
            return {}
        notes = {option: offer(hello.wants[option]) if option in hello.wants else ''
                 for option, offer in self.offers.items()}
        return {**notes, 'access': json.dumps(hello.rules) if any(notes.values()) and hello.rules
                else ''}


# ------------------------------------------------------------------------------------------------
# 25. DNS
#
# The answers for one zone, by which an authority proves a wildcard, and questions of our own (RFC
# 1035): bytes in and bytes out, and then the sockets.
# ------------------------------------------------------------------------------------------------

DNS_HEADER = struct.Struct('>6H')       # id, flags, questions, answers, authorities, additions
DNS_RECORD = struct.Struct('>HHIH')     # behind its name: type, class, seconds to live, length
DNS_PORT = 53
TYPE_A, TYPE_NS, TYPE_SOA, TYPE_MX, TYPE_TXT, TYPE_AAAA, TYPE_OPT, TYPE_ANY, TYPE_CAA = (
    1, 2, 6, 15, 16, 28, 41, 255, 257)
INTERNET = 1                            # the class
IS_ANSWER, IS_TRUE, GO_ON, OPCODE = 0x8000, 0x0400, 0x0100, 0x7800      # flags
NO_ERROR, NO_SUCH_NAME, NOT_OURS, BAD_VERSION = 0, 3, 5, 16
EDNS_SIZE = 1232                # bytes that we say we take by UDP: no path breaks them up
ZONE_SECONDS = 1                # to live: what an order publishes is asked for at once
LONGEST_NAME = 255              # bytes
MOST_RECORDS = 64               # that are looked at; an answer without EDNS hardly holds more
MOST_TEXTS = 4                  # an order has two: so that each answer fits into 512 bytes
POINTER = 0xC000                # to where a name was written before


def encode_name(name: str) -> bytes:
    """NAME as DNS has it: labels behind their lengths."""
    labels = [label.encode() for label in name.strip('.').split('.')]
    return b''.join(bytes([len(label)]) + label for label in labels) + b'\0'


def read_labels(packet: bytes, at: int) -> tuple[list[bytes], int]:
    """The labels of the name in PACKET, in small letters, and where it ends.

    Raises IndexError, and ValueError.
    """
    labels, end, length = [], 0, 1
    while length <= LONGEST_NAME:       # each pointer counts, too: they may lead in a circle
        size = packet[at]
        if size >= POINTER >> 8:
            end, length = end or at + 2, length + 1
            at = (size << 8 | packet[at + 1]) - POINTER
        elif size > 63:
            break
        elif size:
            labels.append(packet[at + 1:at + 1 + size].lower())
            at, length = at + 1 + size, length + 1 + size
        else:
            return labels, end or at + 1
    raise ValueError('a malformed name')


def walk_records(packet: bytes, at: int, count: int) -> Iterator[tuple[int, int, int, int]]:
    """(type, seconds to live, where the data begins and ends) of COUNT records in PACKET.

    Raises what read_labels does, and struct.error.
    """
    for _ in range(min(count, MOST_RECORDS)):
        _, at = read_labels(packet, at)
        kind, _, seconds, size = DNS_RECORD.unpack_from(packet, at)
        begin = at + DNS_RECORD.size
        at = begin + size
        if at > len(packet):
            raise IndexError('a record without its end')
        yield kind, seconds, begin, at


class Zone:
    """What is asked about _acme-challenge.DOMAIN, and answered.

    TXT is what an order has published; SOA and NS are always there.  Whatever else is asked, and
    whatever is below, is there and empty: authorities ask for CAA, DS and types yet unknown, and
    take any error for a refusal.
    """

    def __init__(self, domain: str) -> None:
        self.name = f'_acme-challenge.{domain}'
        self.texts: set[str] = set()        # that an order, or a trial, has published
        self._wire = encode_name(self.name).lower()

    def answer(self, packet: bytes) -> bytes:
        """The answer to PACKET; b'' for what is malformed, or an answer itself."""
        try:
            id, flags, questions, *more = DNS_HEADER.unpack_from(packet)
            _, at = read_labels(packet, DNS_HEADER.size)
            kind, group = struct.unpack_from('>HH', packet, at)
            version = next((seconds >> 16 & 255 for type, seconds, *_ in walk_records(
                packet, at + 4, sum(more)) if type == TYPE_OPT), -1)    # of EDNS (RFC 6891)
        except (struct.error, IndexError, ValueError):
            return b''
        if flags & IS_ANSWER or questions != 1:
            return b''
        name = packet[DNS_HEADER.size:at].lower()
        ours = name.endswith(self._wire) and group in (INTERNET, TYPE_ANY) and not flags & OPCODE
        error = BAD_VERSION if version > 0 else NO_ERROR if ours else NOT_OURS
        apex = at - len(self._wire)         # where the question has the name of the zone
        found = self._records(kind, apex) if not error and name == self._wire else []
        empty = [] if error or found else self._records(TYPE_SOA, apex)
        records = b''.join(
            struct.pack('>H', POINTER | apex) + DNS_RECORD.pack(
                kind, INTERNET, ZONE_SECONDS, len(data)) + data for kind, data in found + empty)
        if version >= 0:
            records += b'\0' + DNS_RECORD.pack(TYPE_OPT, EDNS_SIZE, error >> 4 << 24, 0)
        flags = IS_ANSWER | flags & (GO_ON | OPCODE) | error & 15 | (IS_TRUE if ours else 0)
        return DNS_HEADER.pack(id, flags, 1, len(found), len(empty), version >= 0) + (
            packet[DNS_HEADER.size:at + 4] + records)       # the question as it was spelt

    def _records(self, kind: int, apex: int) -> list[tuple[int, bytes]]:
        """(type, data) of what there is of KIND in the zone whose name is at APEX."""
        if kind == TYPE_TXT:
            return [(kind, bytes([len(text)]) + text.encode())
                    for text in sorted(self.texts)[:MOST_TEXTS]]
        host = struct.pack('>H', POINTER | apex + len('._acme-challenge'))
        fixed = {TYPE_NS: host, TYPE_SOA: host + b'\x0ahostmaster' + host + struct.pack(
            '>5I', 1, 3600, 600, 86400, ZONE_SECONDS)}
        kind = TYPE_SOA if kind == TYPE_ANY else kind       # something has to be said (RFC 8482)
        return [(kind, fixed[kind])] if kind in fixed else []


class Datagrams(asyncio.DatagramProtocol):
    """A UDP socket: GOT(data, sender, transport) is called for each datagram; b'' at an error."""

    def __init__(self, got: Callable[[bytes, Any, Any], None]) -> None:
        self._got = got

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, sender: Any) -> None:
        self._got(data, sender, self._transport)

    def error_received(self, error: Exception) -> None:
        self._got(b'', None, self._transport)


DNS_RATE, DNS_BURST = 200.0, 500.0      # answers a second: an order has a few dozen askers
DNS_CONNECTIONS = 64                    # over TCP at once
DNS_PATIENCE = 5.0                      # seconds for who asks over TCP, and for all our own
DNS_TRIES = 3                           # by UDP, which loses some
SIZE_BEFORE = struct.Struct('>H')       # over TCP, a message stands behind its size


class NameServer:
    """Answers for a Zone, at a bounded rate: who forges senders gains nothing."""

    def __init__(self, runtime: Runtime, zone: Zone) -> None:
        self.zone = zone
        self._runtime = runtime
        self._left, self._at = DNS_BURST, runtime.now()     # answers, and when they were counted
        self._open: dict[str, list[Any]] = {}               # what listens, by host
        self._guests = 0                                    # who came over TCP

    async def listen(self, host: str, port: int) -> None:
        """Answer at PORT of HOST, beside a predecessor where the system can.  Raises OSError."""
        if host in self._open:
            return
        beside = hasattr(socket, 'SO_REUSEPORT') or None
        transport, _ = await self._runtime.loop.create_datagram_endpoint(
            lambda: Datagrams(self._datagram), (host, port), reuse_port=beside)
        try:
            self._open[host] = [transport, await asyncio.start_server(
                lambda reader, writer: self._runtime.spawn(self._serve(reader, writer)),
                host, port, reuse_port=beside)]
        except OSError:
            transport.close()
            raise

    def close(self) -> None:
        """Let nobody come any more."""
        for one in itertools.chain(*self._open.values()):
            one.close()

    def _answer(self, packet: bytes) -> bytes:
        now = self._runtime.now()
        self._left = min(DNS_BURST, self._left + (now - self._at) * DNS_RATE)
        self._at = now
        if self._left < 1:
            return b''
        self._left -= 1
        return self.zone.answer(packet)

    def _datagram(self, data: bytes, sender: Any, transport: Any) -> None:
        answer = self._answer(data)
        if answer:
            transport.sendto(answer, sender)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._guests += 1
        try:
            if self._guests <= DNS_CONNECTIONS:
                await asyncio.wait_for(self._converse(reader, writer), DNS_PATIENCE)
        except (OSError, EOFError, asyncio.TimeoutError):
            pass                # they left, or take too long
        finally:
            self._guests -= 1
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer each question of who came over TCP, up to a malformed one.  Raises EOFError."""
        while True:
            size, = SIZE_BEFORE.unpack(await reader.readexactly(SIZE_BEFORE.size))
            answer = self._answer(await reader.readexactly(size))
            if not answer:
                break
            writer.write(SIZE_BEFORE.pack(len(answer)) + answer)
            await writer.drain()


def way_to(address: str) -> str:
    """The address of this machine from which it would reach ADDRESS; '' for no way."""
    family = socket.AF_INET6 if ':' in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect((address, 9))      # of UDP: nothing is sent
        return str(sock.getsockname()[0])
    return ''


def outward_addresses() -> list[str]:
    """This machine's own addresses on its ways out; a resolver of its own may hold loopback's."""
    return [address for address in map(way_to, ('192.0.2.1', '2001:db8::1')) if address]


def public_address() -> str:
    """One of them that all the world reaches; '' without one."""
    return next((address for address in outward_addresses()
                 if ipaddress.ip_address(address).is_global), '')


def record_here(name: str) -> str:
    """The record that leads NAME to this machine, as DNS providers ask for it."""
    here = public_address()
    return (f'name {name}, type {"AAAA" if ":" in here else "A"}, value '
            + (here or 'the public address of this machine'))


def system_resolver() -> tuple[str, int] | None:
    """Whom this system asks, where it has such a file."""
    with contextlib.suppress(OSError), open('/etc/resolv.conf', encoding='ascii',
                                            errors='replace') as f:
        match = re.search(r'(?m)^nameserver\s+(\S+)', f.read())
        if match:
            return match.group(1), DNS_PORT
    return None


def place_of_resolver(text: str) -> tuple[str, int]:
    """ADDRESS or ADDRESS:PORT, of IPv6 in brackets where a port follows."""
    host, port = (text, str(DNS_PORT)) if is_address(text) else text.rpartition(':')[::2]
    if not is_address(host):
        raise argparse.ArgumentTypeError(f'{text!r} is not an address, such as 9.9.9.9')
    return host.strip('[]'), port_number(port)


def read_records(packet: bytes, kind: int) -> list[bytes]:
    """The data of the records of KIND in PACKET, an answer: of NS and MX the name, with dots.

    Raises what walk_records does.
    """
    answers = DNS_HEADER.unpack_from(packet)[3]
    _, at = read_labels(packet, DNS_HEADER.size)
    before = {TYPE_NS: 0, TYPE_MX: 2}.get(kind)     # bytes before a name
    return [packet[begin:end] if before is None else b'.'.join(
                read_labels(packet, begin + before)[0])
            for this, _, begin, end in walk_records(packet, at + 4, answers) if this == kind]


async def ask_dns(resolver: tuple[str, int], name: str, kind: int) -> list[bytes] | None:
    """The data of the records of KIND at NAME, [] for none; None where RESOLVER does not say."""
    loop = asyncio.get_running_loop()
    packet = DNS_HEADER.pack(secrets.randbelow(1 << 16), GO_ON, 1, 0, 0, 0) + encode_name(
        name) + struct.pack('>HH', kind, INTERNET)
    got: asyncio.Future[bytes] = loop.create_future()

    def answered(data: bytes, _: Any, __: Any) -> None:
        if not got.done() and (not data or data[:2] == packet[:2] and data[2:3] >= b'\x80'):
            got.set_result(data)
    try:
        transport, _ = await loop.create_datagram_endpoint(
            lambda: Datagrams(answered), remote_addr=resolver)
        with contextlib.closing(transport):
            for _ in range(DNS_TRIES):
                transport.sendto(packet)
                await asyncio.wait({got}, timeout=DNS_PATIENCE / DNS_TRIES)
                if got.done():
                    break
        answer = got.result() if got.done() else b''
        error = DNS_HEADER.unpack_from(answer)[1] & 15
        return None if error not in (NO_ERROR, NO_SUCH_NAME) else read_records(answer, kind)
    except (OSError, struct.error, IndexError, ValueError):
        return None


async def caa_terms(resolver: tuple[str, int], domain: str,
                    hosts: Sequence[str]) -> list[tuple[str, str, str, list[str]]]:
    """(where, host, tag, values) of the CAA records that say who may issue for HOSTS (RFC 8659).

    They are at DOMAIN, or above; nothing stands here of a host for which anyone may.
    """
    where, said = domain, []        # type: str, list[tuple[str, str]]
    while where and not said:
        found = await ask_dns(resolver, where, TYPE_CAA) or ()
        texts = [(data.decode('latin-1'), 2 + data[1]) for data in found if len(data) > 2]
        said = [(text[2:end].lower(), text[end:]) for text, end in texts]
        where = where if said else where.partition('.')[2]
    terms = []
    for host in hosts:
        tag = 'issuewild' if '*' in host and 'issuewild' in dict(said) else 'issue'
        terms.append((where, host, tag, [value for this, value in said if this == tag]))
    return [term for term in terms if term[-1]]


async def addresses_in_dns(resolver: tuple[str, int], host: str) -> list[str]:
    """The addresses of HOST, [] for none.  Raises Disconnected where RESOLVER does not say."""
    answers = [await ask_dns(resolver, host, kind) for kind in (TYPE_A, TYPE_AAAA)]
    if answers == [None, None]:
        raise Disconnected('the resolver {}:{} does not answer'.format(*resolver))
    return [str(ipaddress.ip_address(data)) for some in answers for data in some or ()
            if len(data) in (4, 16)]


# ------------------------------------------------------------------------------------------------
# 26. Windows
#
# Windows that fit the path: what keeps a long one busy would only fill memory where it is short.
#
# A window doubles when it is drained within two round trips, since then the window itself limits
# the speed; a small one grows fourfold where a round trip is long.  Drained means three quarters:
# the rest may not be promised yet.  When draining takes more than sixteen, the window halves, by
# promising less than was read; the first read after a silence returns it to its first size.  So a
# long, fast path gets large windows, and a reader that stalls keeps a small one.  Growth comes out
# of the budgets of the session and the process, and takes at most a quarter of what is left, so
# others can always grow.
# ------------------------------------------------------------------------------------------------

MAX_WINDOW = 16 * MIB           # of one stream: 1 Gbit/s over a path of 130 ms
LONG_PATH = 0.03                # a round trip to another town: windows grow faster from here on
IDLE_WINDOW = 1.0               # without a read, then a window returns to its first size


class AdaptiveWindow(ReceiveWindow):
    """A window that grows and shrinks."""
    __slots__ = ('_floor', '_drained', '_since', '_last')

    def __init__(self, size: int, budget: Budget) -> None:
        super().__init__(size, budget)
        self._floor = size          # it never shrinks below this
        self._drained = 0           # bytes that were read since `_since`
        self._since = self._last = -NEVER       # when that began, and the last read

    def consumed(self, n: int, now: float, round_trip: float) -> int:
        self.read += n
        self._drained += n
        if now - self._last > max(IDLE_WINDOW, 16 * round_trip):
            self._shrink_to(self._floor)
            self._drained, self._since = self.read, now
        self._last = now
        if self.read * 4 >= self.size and self._drained * 4 >= self.size * 3:
            self._adapt(now - self._since, round_trip)
            self._drained, self._since = 0, now
        return super().consumed(0, now, round_trip)

    def _adapt(self, took: float, round_trip: float) -> None:
        if took <= 2 * round_trip:
            more = 3 * self.size if round_trip > LONG_PATH and self.size < MIB else self.size
            if self.size + more <= MAX_WINDOW and self.budget.take(more, leave=3 * more):
                self.read += more
                self.size += more
        elif took > 16 * round_trip and self.size >= 2 * self._floor:
            self._shrink_to(self.size // 2)

    def _shrink_to(self, size: int) -> None:
        less = self.size - size
        if less > 0:
            self.size -= less
            self.read -= less
            self.budget.give(less)


class Windows(Annex):
    """At both ends."""

    def at_client(self, args: Args, app: App, address: ServerAddress) -> None:
        address.window = AdaptiveWindow

    def at_any_server(self, server: Server) -> None:
        server.admission.window = AdaptiveWindow


# ------------------------------------------------------------------------------------------------
# 27. Resume
#
# A session survives its connection: each side keeps what the other has not acknowledged (the counts
# in PING and PONG), and a new connection continues at the byte where the other stopped counting.
# The client asks for it in its hello, by the id that the welcome gave the session; that the server
# has it, and all that is missing on either side, shows in the next welcome.  Where it does not go
# on, the client begins a new one.
# ------------------------------------------------------------------------------------------------

KEPT_FOR_RESUME = 8 * MIB       # sent but not acknowledged: 640 Mbit/s over a path of 100 ms
KEPT_AT_FIRST = 256 * KIB       # of it in any case; the budget gives the rest in such steps
ACKNOWLEDGE_EVERY = 1 * MIB     # after sending this much, a PING asks how much has arrived
ACKNOWLEDGED = 60.0             # for a PONG of one who is heard: else nothing is acknowledged
RESUME_WITHIN = 60.0            # a session without a connection is kept this long
UNHEEDED = ProtocolError('nothing is acknowledged')


class Unacknowledged(Outbox):
    """What leaves, and is kept until the other side has it: another connection may need it.

    KEPT_AT_FIRST bytes of it are free; the rest is taken from the budget in steps of that size.
    """

    def __init__(self, session: Session, trace: Trace | None) -> None:
        super().__init__(session, trace)
        self.kept_from = 0          # of `sent`: from this byte on all is kept
        self.limit = KEPT_AT_FIRST  # of `sent`: up to this byte it may be kept
        self.ask_after = ACKNOWLEDGE_EVERY
        self._kept: collections.deque[bytes] = collections.deque()
        self.keep = self._kept.append

    def has_room(self) -> bool:
        connection = self.session.connection
        if self.size >= BATCH or connection is None or connection.writing_paused:
            return False            # as in any session: to ask that costs a call for each frame
        if self.sent + self.size < self.limit or self.widen():
            return True
        if self.session.liveness.asked_at == NEVER:
            self.session.ping()
        return False

    def _merge(self) -> None:
        super()._merge()
        if self.sent > self.limit + 2 * BATCH:      # what the other side causes asks for no room
            self.session.runtime.loop.call_soon(self.session.end, UNHEEDED)

    def widen(self) -> bool:
        """Raise the limit by one step; return whether that was possible."""
        if self.limit - self.kept_from >= KEPT_FOR_RESUME or not self.session.budget.take(
                KEPT_AT_FIRST, leave=3 * KEPT_AT_FIRST):
            return False
        self.limit += KEPT_AT_FIRST
        return True

    def confirm(self, n: int) -> None:
        super().confirm(n)
        may_keep = self.limit - self.kept_from
        while self._kept and self.kept_from + len(self._kept[0]) <= n:
            self.kept_from += len(self._kept.popleft())
        self.limit = self.kept_from + may_keep
        if may_keep > KEPT_AT_FIRST > self.sent - self.kept_from:
            self._give_back()

    def _give_back(self) -> None:
        free = self.kept_from + KEPT_AT_FIRST
        self.session.budget.give(self.limit - free)
        self.limit = free

    def after(self, n: int) -> bytes:
        """Return what follows byte N."""
        return b''.join(self._kept)[n - self.kept_from:]

    def clear(self) -> None:
        """Keep nothing: nothing will be sent again."""
        self._kept.clear()
        self._give_back()


class Resumable(Session):
    """Streams over a connection that may be replaced; `id` is the server's word for it."""
    outbox: Unacknowledged

    def __init__(self, *what: Any) -> None:
        super().__init__(*what)
        self.outbox = Unacknowledged(self, self.outbox.trace)
        self.id = secrets.token_hex(16)     # at a client, what the welcome says
        self.theirs: int | None = None      # bytes that the other side has; None: it begins anew

    def can_resume(self, theirs: int) -> bool:
        """True if what follows byte THEIRS is still here."""
        return self.error is None and self.outbox.kept_from <= theirs <= self.outbox.sent

    def claim(self) -> Facts:
        return {} if self.error else {
            'resume': {'session': self.id, 'received': self.decoder.received}}

    def welcome(self) -> Facts:
        return {'session': self.id, 'resume': self.theirs, 'received': self.decoder.received}

    def goes_on(self, welcome: Facts) -> bool:
        count = welcome.get('received')
        if (welcome.get('resume') is not None and isinstance(count, int)
                and self.can_resume(count)):
            self.theirs = count
            return True
        self.end(Disconnected('the server no longer knows this session'))
        return False

    def attach(self, connection: Connection, said: Facts | None = None) -> None:
        """Begin on CONNECTION, or go on with what the other side has not received."""
        if said:
            self.id = str(said.get('session', ''))[:MAX_TEXT]
        old, theirs, round_trip = self._let_go(), self.theirs or 0, self.liveness.round_trip
        if old is not None:
            old.abort()
        self.outbox.confirm(theirs)
        self.liveness, self.lost_at = Liveness(self.liveness.pings, self.runtime.now()), NEVER
        self.liveness.round_trip = round_trip
        again = self.outbox.after(theirs)
        if again:
            connection.transport.write(again)
        super().attach(connection)

    def ping(self) -> None:
        self.outbox.ask_after = self.outbox.sent + ACKNOWLEDGE_EVERY
        super().ping()

    def drop(self, why: str = 'the session ended') -> None:
        """Give up the connection; the session waits for another, unless it was to end."""
        if self.state != RUNNING or self.goaway is not None:
            return super().drop(why)
        connection = self._let_go()
        if connection is not None:
            connection.abort()
            self.lost_at = self.runtime.now()
            self.on_change()

    def sweep(self, now: float, woke_up: bool) -> None:
        super().sweep(now, woke_up)
        if self.connection is None:
            if now - self.lost_at > RESUME_WITHIN:
                self.end(Disconnected(f'it had no connection for {RESUME_WITHIN:.0f} s'))
        elif now - self.liveness.asked_at > ACKNOWLEDGED:
            self.end(UNHEEDED)

    def end(self, error: LocaltunnelError) -> None:
        super().end(error)
        self.outbox.clear()


class Resume(Annex):
    """Sessions go on at both ends; the server looks whose they are."""

    def at_client(self, args: Args, app: App, address: ServerAddress) -> None:
        address.session = Resumable

    def at_any_server(self, server: Server) -> None:
        server.admission.session = Resumable
        server.admission.returning = functools.partial(self.resumed, server.admission)

    def resumed(self, admission: Admission, asked: Candidate) -> Admitted | None:
        """The session of this client that goes on, since nothing is missing; None without one.

        One whose welcome was lost goes on too: all that was sent is sent again.  Raises Refused.
        """
        hello, grant, tunnel = asked.hello, asked.grant, asked.tunnel
        member = next((m for m in tunnel.members if m.hello.instance == hello.instance), None)
        if member is None:
            return None
        if hello.attempt < member.hello.attempt:
            raise Refused(409, 'stale', 'this client has already connected again in the meantime')
        session, (id, received) = member.session, hello.resume
        assert isinstance(session, Resumable)       # as all are here
        theirs = received if same(session.id, id) else None
        if not session.can_resume(theirs or 0) or (theirs is None and session.decoder.received):
            return None
        if member.hello.proof != hello.proof or (member.grant.user, member.grant.digest) != (
                grant.user, grant.digest):
            return None         # somebody else's session: this client begins its own
        admission.check_kind(asked)
        member.hello.attempt, member.grant, session.facts = hello.attempt, grant, asked.facts
        session.theirs = theirs
        return member, tunnel, theirs is not None


# ------------------------------------------------------------------------------------------------
# 28. Kept leases
#
# The leases of a server in files, so that they survive it.  A change is a line at the end of a
# journal, which costs the same however many leases there are.  Now and then the journal becomes
# part of the file beside it, which people can read and mend; sqlite3 would be neither that nor in
# every Python.
# ------------------------------------------------------------------------------------------------

LEASES = 'leases.json'          # {"leases": {NAME: LEASE}}; each line of the journal {NAME: LEASE}
JOURNAL = '.journal'            # what is added to the name for the changes since
JOURNAL_LINES = 1000            # of changed leases, at least, before all are written anew


def pack_lease(lease: Lease | None) -> dict[str, Any] | None:
    """LEASE as it stands in a file."""
    return lease and {word: value for word, value in lease._asdict().items()
                      if value or word != 'facts'}


def unpack_lease(name: str, lease: Any) -> Lease | None:
    """The LEASE of NAME as it stood in a file.  Raises ValueError or what JSON amiss leads to."""
    if lease is None:
        return None
    owner, token, used = lease['owner'], lease['token'], lease['used']
    facts = lease.get('facts', {})
    if not (isinstance(owner, str) and isinstance(token, str) and type(used) is int
            and 0 <= used < 1 << 53 and re.fullmatch(f'tcp:[0-9]{{1,5}}|{NAME.pattern}', name)
            and all(isinstance(value, str) for value in facts.values())):
        raise ValueError(f'the lease of {name!r:.80} has a bad name, owner, token, date or fact')
    return Lease(owner, token, used, facts)


class Journal:
    """Keeps LEASES in the file at `path` and its journal."""

    def __init__(self, leases: Leases, path: str) -> None:
        """Give LEASES what is there.  Raises UsageError for a damaged file, and OSError."""
        self._leases, self._path = leases, path
        self._lines = 0             # of the journal
        self._disk = Disk()
        try:
            leases.make({name: unpack_lease(name, lease) for name, lease in self._read()})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise UsageError(f'{path} is damaged ({e}); repair it and its journal, or move both '
                             'away to begin without leases') from e
        if self._lines:
            self._compact({})

    def _read(self) -> Iterator[tuple[str, Any]]:
        """Names and leases, the oldest first."""
        if os.path.exists(self._path):
            with open(self._path, encoding='ascii') as f:
                yield from json.load(f)['leases'].items()
        if os.path.exists(self._path + JOURNAL):
            with open(self._path + JOURNAL, encoding='ascii') as f:
                for line in f.read().split('\n')[:-1]:     # the last was cut off by a crash
                    yield from json.loads(line).items()
                    self._lines += 1

    async def keep(self, changes: Changes) -> None:
        """Write CHANGES.  Raises Refused."""
        try:
            await self._disk.do(self.write, changes)
        except OSError as e:
            raise Refused(503, 'state', f"the server can't save its leases: {e.strerror}") from e

    def write(self, changes: Changes) -> None:
        """Write CHANGES.  Raises OSError, and then they must not be made."""
        lines = {name: pack_lease(lease) for name, lease in changes.items()}
        self._append(json.dumps(lines).encode() + b'\n')
        if self._lines > max(JOURNAL_LINES, len(self._leases.by_name)):
            with contextlib.suppress(OSError):      # the journal has it all, too
                self._compact(changes)

    def _append(self, line: bytes) -> None:
        handle = os.open(self._path + JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND
                         | getattr(os, 'O_NOFOLLOW', 0), 0o600)
        with open(handle, 'ab', buffering=0) as f:
            size = f.seek(0, os.SEEK_END)
            try:
                if f.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(handle)
            except OSError:
                f.truncate(size)
                raise
        self._lines += 1

    def _compact(self, changes: Changes) -> None:
        there = {name: pack_lease(lease) for name, lease in {**self._leases.by_name,
                                                             **changes}.items() if lease}
        write_secret(self._path, json.dumps({'leases': there}, indent=1).encode())
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path + JOURNAL)
        self._lines = 0


class KeptLeases(Annex):
    """A journal for what a server leases."""

    async def at_server(self, args: Args, server: Server) -> None:
        leases = server.admission.leases
        with using(args.state):
            leases.keepers.append(Journal(leases, os.path.join(args.state, LEASES)).keep)


# ------------------------------------------------------------------------------------------------
# 29. Access
#
# Who may visit: which addresses, and which users with their passwords.
#
#   "allow"   [CIDR, ...]
#   "auth"    [[salt, SHA256 of salt and USER:PASSWORD], ...]
# ------------------------------------------------------------------------------------------------

MAX_RULES = 100                 # of a tunnel, each of --allow and --auth: all are checked
AUTHORIZATION = re.compile(rb'(?im)^authorization:.*\n')


def bounded(rule: Sequence[Any]) -> Sequence[Any]:
    """Return RULE.  Raises ValueError if it is too long to be looked at for each request."""
    if len(rule) > MAX_RULES:
        raise ValueError(f'more than {MAX_RULES} rules')
    return rule


def gate_of_networks(rule: Sequence[str]) -> Gate:
    """Keeps out who does not come from one of the networks of RULE."""
    networks = [ipaddress.ip_network(cidr, strict=False) for cidr in bounded(rule)]

    def gate(key: str, visitor: Visitor, lines: bytes) -> bytes:
        if not within(visitor.address, networks):
            raise HopFailed(403, f'{visitor.address} may not visit this tunnel',
                            cure='give the client one more --allow, with this address')
        return lines
    return gate


def is_user(authorization: bytes, users: Iterable[tuple[str, str]]) -> bool:
    """Return True if AUTHORIZATION, the field's value, has name and password of one of USERS."""
    scheme, _, encoded = authorization.partition(b' ')
    try:
        given = base64.b64decode(encoded.strip(), validate=True).decode()
    except ValueError:
        return False
    right = False
    for salt, digest in users:
        right |= same(digest_of(salt + given), digest)
    return right and scheme.lower() == b'basic'


def gate_of_users(rule: Sequence[tuple[str, str]]) -> Gate:
    """Keeps out who is none of the users of RULE; the app does not see their passwords."""
    users = [(str(salt), str(digest)) for salt, digest in bounded(rule)]

    def gate(key: str, visitor: Visitor, lines: bytes) -> bytes:
        if visitor.exchange and not is_user(visitor.exchange.request.get(b'authorization'), users):
            raise HopFailed(401, 'this tunnel needs a user name and a password',
                            f'WWW-Authenticate: Basic realm="{key}", charset="UTF-8"',
                            cure='the client was started with --auth USER:PASSWORD')
        return AUTHORIZATION.sub(b'', lines)
    return gate


class Access(Annex):
    """--allow and --auth."""
    title = 'who may visit'

    def client_options(self, add: Add) -> None:
        add('--auth', action='append', default=[], metavar='USER:PASSWORD',
            help='visitors must log in (repeatable)')
        add('--allow', type=network, action='append', default=[], metavar='CIDR',
            help='only these visitors may come (repeatable)')

    def at_client(self, args: Args, app: App, address: ServerAddress) -> None:
        if any(':' not in user for user in args.auth):
            raise UsageError('--auth takes USER:PASSWORD')

    def hello(self, args: Args, key: bytes) -> dict[str, Any]:
        salted = [(hmac.new(key, user.encode(), hashlib.sha256).hexdigest(), user)
                  for user in args.auth]
        return {'allow': [str(cidr) for cidr in args.allow],
                'auth': [(salt, digest_of(salt + user)) for salt, user in salted]}

    def at_any_server(self, server: Server) -> None:
        server.limits.gates.update(allow=gate_of_networks, auth=gate_of_users)


# ------------------------------------------------------------------------------------------------
# 30. Cluster
#
# Several servers behind a balancer, which share nothing but a key.  One of them leases a chosen
# name, and when that one is down the client comes to another: so it brings the lease along, as the
# first one signed it.  The signature comes first, then name, owner, token, date and facts as JSON.
#
# Two facts are of this room.  `since` is when the owner had the name first: where two owners bring
# leases of one name, the older one holds, wherever it was made.  `over` says which owners gave the
# name back, and when: what they were given up to then is void.  A lease is of no use to a thief: it
# is good for its owner alone, who shows a token or a proof as without it.
# ------------------------------------------------------------------------------------------------

MAX_LEASE = 4 * KIB             # characters of one that a client keeps
MAX_OVER = 4                    # owners who gave a name back, of each name: the last ones
MAX_FREE = 1000                 # names remembered that were given back and that nobody has since
NOBODYS = Lease('', '', 0)      # of one of these, beside its facts; it has ended long ago


def pack_over(over: Mapping[str, int]) -> str:
    """The fact that says who gave a name back, and when."""
    last = sorted(over.items(), key=lambda item: item[1])[-MAX_OVER:]
    return ' '.join(f'{owner}={when}' for owner, when in last)


def read_over(fact: str) -> list[tuple[str, int]]:
    """What such a fact says.  Raises ValueError."""
    words = (word.rpartition('=') for word in fact.split())
    return [(owner, int(when)) for owner, _, when in words]


def began(lease: Lease) -> int:
    """When the owner of LEASE had the name first."""
    return int(lease.facts.get('since', lease.used))


class Node(Others):
    """One of the servers: what is signed by it, or by another, and what follows from it."""

    def __init__(self, server: Server, key: bytes) -> None:
        self._leases, self._tunnels = server.admission.leases, server.tunnels
        self._key = hmac.new(key, b'localtunnel/1 lease\0' + server.domain.encode(),
                             hashlib.sha256).digest()
        server.tunnels.others = self
        server.admission.checks.append(self.check)
        server.limits.offers['sni'] = lambda said: ''        # it was asked to, see `check`
        self._leases.keepers.insert(0, self._remember)
        self._leases.check_fact('since', int, server.log.note)
        self._leases.check_fact('over', read_over, server.log.note)

    def may_know(self, name: str) -> bool:
        try:
            check_name(name)        # of a derived name all know enough
        except Refused:
            return False
        return self._leases.owner(name, time.time()) is None

    @staticmethod
    def check(asked: Candidate) -> None:
        """Raises Refused where a client does not come on the way that its visitors take."""
        visitor, wants = asked.visitor, asked.hello.wants
        if visitor.connection.secure and not visitor.front and not wants.get('sni'):
            raise Refused(421, 'sni', 'a balancer passes TLS on to this server by the name in it, '
                          'and this client does not send that of its tunnel; fetch the client from '
                          'this server')

    def lease(self, name: str) -> str:
        lease = self._leases.by_name.get(name)
        if lease is None:
            return ''
        text = json.dumps([name, *lease._replace(facts=self._facts(name, lease))])
        return f'{self._signature(text)} {text}'

    async def bring(self, lease: str, name: str, owner: str, token: str) -> None:
        """Take LEASE down, unless it is void or an older one holds."""
        book, now = self._leases, time.time()
        here = book.by_name[name] if book.owner(name, now) else None
        brought = self._read(lease, name, owner, now)
        if here and here.owner == owner:
            await book.save(book.note(name, **self._facts(name, *filter(None, (here, brought)))))
        elif brought and (not here or self._comes_before(name, brought, here)):
            await book.save({**book.claim(name, owner, token, now), name: Lease(
                owner, token, int(now), self._facts(name, brought))})
            self._tunnels.end(name, f'the name {name} belongs to a client that had it before')

    def _read(self, lease: str, name: str, owner: str, now: float) -> Lease | None:
        """The LEASE of NAME, if it is genuine, that of OWNER, and has not ended."""
        signature, _, text = lease.partition(' ')
        if not same(signature, self._signature(text)):
            return None
        of, *rest = json.loads(text)
        found = Lease(*rest)
        holds = self._leases.holds(found, now) and not self._is_void(found, self._overs(name))
        return found if holds and (of, found.owner) == (name, owner) else None

    def _comes_before(self, name: str, brought: Lease, here: Lease) -> bool:
        """True if the lease BROUGHT of NAME holds, and not the one HERE, of another owner."""
        over = self._overs(name, brought, here)
        return not self._is_void(brought, over) and (
            self._is_void(here, over)
            or (began(brought), brought.owner) < (began(here), here.owner))

    @staticmethod
    def _is_void(lease: Lease, over: dict[str, int]) -> bool:
        return began(lease) <= over.get(lease.owner, -1)

    def _overs(self, name: str, *leases: Lease) -> dict[str, int]:
        """Who gave NAME back, and when, as far as is known here and to LEASES."""
        known = filter(None, (self._leases.by_name.get(name), *leases))
        over: dict[str, int] = {}
        for owner, when in read_over(' '.join(lease.facts.get('over', '') for lease in known)):
            over[owner] = max(when, over.get(owner, 0))
        return over

    def _facts(self, name: str, *leases: Lease) -> dict[str, str]:
        """What LEASES of one owner of NAME say together; other facts are of one server alone."""
        facts, over = {'since': str(min(map(began, leases)))}, self._overs(name, *leases)
        return {**facts, 'over': pack_over(over)} if over else facts

    def _signature(self, text: str) -> str:
        return hmac.new(self._key, text.encode(errors='replace'), hashlib.sha256).hexdigest()

    async def _remember(self, changes: Changes) -> None:
        """Add to CHANGES whose leases they end: a restart must not make an old one good again."""
        book = self._leases
        for name, lease in tuple(changes.items()):
            over, ended = self._overs(name, *filter(None, [lease])), book.by_name.get(name)
            if ended and lease is None and book.owner(name, time.time()):
                over[ended.owner] = max(int(time.time()), began(ended))     # clocks may differ
                lease = NOBODYS
            if lease and over:
                changes[name] = lease._replace(facts={**lease.facts, 'over': pack_over(over)})
        if any(lease and lease.owner == NOBODYS.owner for lease in changes.values()):
            free = [name for name, lease in book.by_name.items() if lease.owner == NOBODYS.owner]
            changes.update((name, None) for name in free[:-MAX_FREE] if name not in changes)


def read_cluster_key(path: str, warn: Callable[[str], None]) -> bytes:
    """Return the key in the file at PATH.  Raises UsageError."""
    cure = ('copy that of the other servers, or make the first with: (umask 077; python3 '
            f'localtunnel.py server --make-cluster-key > {path})')
    try:
        key = read_secret(path, 'can take names on this cluster; make a new one', warn).strip()
    except OSError as e:
        raise UsageError(f"can't read the cluster key {path}: {e.strerror}; {cure}") from e
    if not re.fullmatch(b'[0-9a-f]{64}', key):
        raise UsageError(f'{path} does not hold a cluster key, which is 64 hexadecimal digits; '
                         + cure)
    return bytes.fromhex(key.decode())


class MakeClusterKey(argparse.Action):
    """Prints a key."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print_line(secrets.token_hex(32))
        parser.exit()


class Cluster(Annex):
    """A key for several servers; and the lease of a chosen name that a client brings to them."""
    title = 'more than one server'

    def server_options(self, add: Add) -> None:
        add('--cluster-key', metavar='FILE',
            help='file with the key that the servers of a cluster have in common')
        add('--make-cluster-key', action=MakeClusterKey, nargs=0,
            help='print such a key, and exit')

    async def at_server(self, args: Args, server: Server) -> None:
        if args.cluster_key:
            Node(server, read_cluster_key(args.cluster_key, lambda text: server.log.note(
                f'warning: {text}')))

    def at_client(self, args: Args, app: App, address: ServerAddress) -> None:
        """Keep the lease of a chosen name, for this server and no other."""
        if not args.name:
            return
        path = config_path('lease-' + digest_of(f'{address} {args.name}')[:32])

        def keep(lease: object) -> None:
            if lease == address.lease or not re.fullmatch(f'[ -~]{{0,{MAX_LEASE}}}', str(lease)):
                return
            address.lease = str(lease)
            try:
                os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
                write_secret(path, address.lease.encode())
            except OSError as e:
                app.observer.note(f"can't keep the lease of {args.name} in {path} ({e.strerror}), "
                                  'so it lasts only for this run')
        with contextlib.suppress(OSError, ValueError):
            address.lease = read_secret(path, f'knows that {args.name} is yours',
                                        app.observer.note).decode('ascii')[:MAX_LEASE]
        address.on_lease = keep


# ------------------------------------------------------------------------------------------------
# 31. Held requests
#
# While a client is on its way back, and while its tunnel has room for no more streams, requests
# wait: not for long, not many, and in no order.  Those that it has taken wait, too.
# ------------------------------------------------------------------------------------------------

MAX_HELD = 100                  # requests that wait for one tunnel: its client, or room there
MAX_HELD_IN_ALL = 1000
MAX_GUESSED = 500               # of these, for clients of other servers; half for one address
UNHEARD = 5.0                   # for one of whom nothing is known here: a dead machine costs 4 s
ROOM_WITHIN = 2.0               # for other streams of a full tunnel to end, before a 503
UNANSWERED = 27.0               # of a client's silence, for a visitor without a byte of a response
HELD_AFTER_BREAK = 30.0         # since a client went without goodbye: requests still wait for it
ROOM_LOOK = 0.1                 # between looks whether streams of a full tunnel have ended


class Held(Waits):
    """The requests that wait: for a client, or for room in its tunnel."""

    def __init__(self, server: Server) -> None:
        super().__init__(server.tunnels)
        self.count = 0              # how many wait, in all
        self._now, self._look_at = server.runtime.now, 0.0      # when all sessions are looked at
        self._from: dict[str, int] = collections.Counter()      # how many, by visitor's subnet
        server.runtime.swept.add(self)

    def sweep(self, now: float, woke_up: bool) -> None:
        """Let requests go on that wait for the answer of a session that is away.

        Now and then: there may be thousands of tunnels.
        """
        if now >= self._look_at:
            self._look_at = now + 4 * SWEEP
            for tunnel in self.tunnels:
                for member in tunnel.members:
                    if member.session.connection is None:
                        self._move_on(member.session, tunnel, now)

    def _move_on(self, session: Session, tunnel: Tunnel, now: float) -> None:
        """Requests without an answer wait for SESSION, which is away, no longer than they must.

        Those that may be repeated go to another client, and after UNANSWERED all have their end.
        """
        moves = now - session.lost_at > self.tunnels.hold and tunnel.pick() is not None
        overdue = now - session.liveness.heard > UNANSWERED
        if not (moves or overdue):
            return
        for stream in [*session.streams.values(), *session.outbox.turns]:
            exchange = stream.visitor and stream.visitor.exchange
            if exchange and not exchange.status and (overdue or exchange.repeatable):
                stream.reset(CANCELLED, 'nobody waits for it any more', SessionLost(
                    'its client did not come back') if moves and exchange.repeatable else Overdue(
                    'its client was silent for too long'))

    def may_wait(self, key: str) -> bool:
        """True if there is room for one more that waits for KEY."""
        return len(self.of.get(key, ())) < MAX_HELD and self.count < MAX_HELD_IN_ALL

    def may_guess(self, visitor: Visitor) -> bool:
        """True if there is room for one more that waits for a client which may not be known at all.

        Anyone can make names up, so places are left for others, and for other addresses than that
        of VISITOR.
        """
        return (self.count < MAX_GUESSED
                and self._from.get(subnet_of(visitor.address), 0) < MAX_GUESSED // 2)

    async def wait(self, key: str, visitor: Visitor, seconds: float) -> bool:
        """Let VISITOR wait for KEY; return whether it was woken before SECONDS were over."""
        waiting, subnet = self.of.setdefault(key, set()), subnet_of(visitor.address)
        self.count += 1
        self._from[subnet] += 1
        try:
            return await wait_for(visitor, seconds, waiting)
        finally:
            self.count -= 1
            self._from[subnet] -= 1
            if not self._from[subnet]:
                del self._from[subnet]
            if not waiting:
                self.of.pop(key, None)

    def wake(self, *keys: str) -> None:
        for key in keys or self.of:
            for future in self.of.get(key, ()):
                if not future.done():
                    future.set_result(None)

    async def for_stream(self, key: str, visitor: Visitor,
                         lines: bytes = b'') -> tuple[Stream, bytes]:
        """Wait until a client is there, and then until others have made room."""
        await self._client(key, visitor)
        deadline = self._now() + ROOM_WITHIN
        while True:
            opened = self.tunnels.open_stream(key, visitor, lines)
            if opened:
                return opened
            await self._room(key, visitor, deadline)

    async def _client(self, key: str, visitor: Visitor) -> None:
        deadline = self._now() + min(
            self.tunnels.hold, UNHEARD if self._is_unheard(key) else NEVER)
        while True:         # it may be lost again at once
            tunnel = self.tunnels.get(key)
            if tunnel and tunnel.pick():
                return
            if not (self.expects(key, tunnel, visitor)
                    and await self.wait(key, visitor, deadline - self._now())):
                raise (no_tunnel(f'there is no tunnel of the name {key}')
                       if self._is_unheard(key) else self.tunnels.away(key))

    def _is_unheard(self, key: str) -> bool:
        others = self.tunnels.others
        return others is not None and self.tunnels.get(key) is None and others.may_know(key)

    def expects(self, key: str, tunnel: Tunnel | None, visitor: Visitor) -> bool:
        """True if a client may come back soon, and the request of VISITOR may wait for it."""
        broke = tunnel is not None and self._now() - tunnel.left_at < HELD_AFTER_BREAK
        ended = tunnel is not None and tunnel.ended
        guess = self.tunnels.others is not None and self.may_guess(visitor)
        return ((broke or self.tunnels.starting or guess) and not ended
                and self.tunnels.state != ENDING and self.may_wait(key))

    async def _room(self, key: str, visitor: Visitor, deadline: float) -> None:
        """Wait a moment for others to end.  Raises HopFailed after DEADLINE."""
        if self._now() >= deadline or not self.may_wait(key):
            raise no_room(key)
        await self.wait(key, visitor, ROOM_LOOK)


class Unnamed(Detour):
    """Requests to a server that has a place for one tunnel, while that one has not come yet."""

    def __init__(self, server: Server, held: Held, only: OnlyOne) -> None:
        self._server, self._held, self._only = server, held, only

    async def take(self, visitor: Visitor, exchange: Exchange, key: str) -> None:
        server, request = self._server, exchange.request
        ours = request.target in server.pages.everywhere
        while not (key or ours) and self._held.expects('', None, visitor):
            await self._held.wait('', visitor, ROOM_LOOK)
            key = self._only.find(request.host_name)
        if key:
            await server.forward(visitor, exchange, key)
        else:
            await server.give(visitor, exchange, server.pages.find(request, visitor.scheme))

    def waiting(self, key: str) -> int:
        return 0


class Holding(Annex):
    """Requests wait at any server."""

    def at_any_server(self, server: Server) -> None:
        server.tunnels.waits = held = Held(server)
        if server.tunnels.only:
            server.tunnels.detours[''] = Unnamed(server, held, server.tunnels.only)


# ------------------------------------------------------------------------------------------------
# 32. Shared site
#
# The tunnels of a server are one site to browsers, and their owners may not know each other: no app
# sets or deletes the cookies of others.
# ------------------------------------------------------------------------------------------------

# A cookie's Domain; and one that every browser reads as written: no IDNA, no %74, no quotes.
COOKIE_DOMAIN = re.compile(rb';[ \t]*domain[ \t]*=[ \t]*([^;\r]*)')
PLAIN_DOMAIN = re.compile(rb'\.?((?:[a-z0-9_-]*[a-z0-9_]\.)*[a-z0-9_-]*[a-z0-9_])[ \t]*')


class SharedSite(Annex):
    """Leaves out cookies for a server's domain or above, and the order to delete them all."""

    def at_any_server(self, server: Server) -> None:
        server.onward.changes.append(functools.partial(self.own_cookies, server))

    def own_cookies(self, server: Server, response: Response, block: bytes) -> bytes:
        """Return the lines of BLOCK that are for the app's own host."""
        if b'set-cookie' not in response.fields and b'clear-site-data' not in response.fields:
            return block
        own = []
        for line in block.splitlines(keepends=True):
            name, _, value = line.lower().partition(b':')
            if name == b'set-cookie' and any(self.is_shared(domain, server.domain)
                                             for domain in COOKIE_DOMAIN.findall(value)):
                server.log.note('dropped a cookie for the whole domain, which tenants share')
            elif name == b'clear-site-data' and (b'cookies' in value or b'*' in value):
                server.log.note('dropped a Clear-Site-Data: tenants share the cookies')
            else:
                own.append(line)
        return b''.join(own)

    @staticmethod
    def is_shared(domain: bytes, ours: str) -> bool:
        """Return True if a browser may read a cookie's DOMAIN as OURS or above."""
        plain = PLAIN_DOMAIN.fullmatch(domain)
        return bool(domain) and (plain is None or f'.{ours}'.endswith(
            '.' + plain.group(1).decode()))


# ------------------------------------------------------------------------------------------------
# 33. Crowds
#
# Room among visitors: for sessions, for other visitors, and for those of other addresses.
# ------------------------------------------------------------------------------------------------

SPARE_DESCRIPTORS = 128         # for sessions, when visitors have taken all others; or half of few
MAX_CONNECTIONS_OF_ADDRESS = 512        # of visitors: one address can't take a tunnel's streams
PER_ACCEPTED = 32               # descriptors: as many more come in before the first is looked at
OTHER_DESCRIPTORS = 64          # files, and what is accepted before others close; of few: a third


class Bounded(Visitors):
    """Visitors who leave room for sessions; the one idle for longest is the first in `here`."""

    def __init__(self, runtime: Runtime, descriptors: int) -> None:
        """DESCRIPTORS are how many this process may have open."""
        super().__init__(runtime)
        self.descriptors = descriptors
        self._of_subnet: dict[str, int] = collections.Counter()     # connections of each

    def enter(self, connection: Connection) -> Visitor:
        """A visitor came; near the limit the one idle for longest has to go.

        Never let accept() run out of descriptors: asyncio would try again and log without end.
        """
        visitor = super().enter(connection)
        self._of_subnet[subnet_of(visitor.peer)] += 1
        visitor.refusal = self._no_room(visitor)
        if self._spare() < min(OTHER_DESCRIPTORS, self.descriptors // 3):
            idle = (v for v in self.here if v is not visitor and v.idle)
            out = next(idle, visitor)
            del self.here[out]         # the next one must not choose it again
            out.connection.reset(CANCELLED, 'too many connections')
        return visitor

    def active(self, visitor: Visitor) -> None:
        if visitor in self.here:        # it is the last to have to go
            self.here[visitor] = self.here.pop(visitor)

    def leave(self, visitor: Visitor) -> None:
        super().leave(visitor)
        subnet = subnet_of(visitor.peer)
        self._of_subnet[subnet] -= 1
        if not self._of_subnet[subnet]:
            del self._of_subnet[subnet]

    def _spare(self) -> int:
        """Return how many more descriptors there may be."""
        return self.descriptors - len(self.runtime.transports) - self.reserved

    def _no_room(self, visitor: Visitor) -> HopFailed | None:
        """Return why VISITOR can't stay: visitors must leave room for sessions."""
        peer = visitor.peer
        if self._spare() < min(SPARE_DESCRIPTORS, self.descriptors // 2):
            return HopFailed(503, 'the server has too many connections; try again soon',
                             f'Retry-After: {RETRY_AFTER}',
                             cure='the operator of the server can raise its limit of open files')
        if (self._of_subnet[subnet_of(peer)] > MAX_CONNECTIONS_OF_ADDRESS
                and not is_loopback(peer) and not visitor.front):
            return HopFailed(429, f'too many connections from {peer}; close some first',
                             'Retry-After: 1')
        return None


class Crowds(Annex):
    """Limits of visitors' connections."""

    def at_any_server(self, server: Server) -> None:
        limit = descriptor_limit()
        server.visitors = Bounded(server.runtime, limit)
        server.doors.together = max(1, min(ACCEPTED_TOGETHER, limit // PER_ACCEPTED))


# ------------------------------------------------------------------------------------------------
# 34. Raw TCP
#
# A tunnel of bytes, without requests.
# ------------------------------------------------------------------------------------------------

def port_of(tunnel: Tunnel) -> int:
    """The public port of a raw TCP tunnel that has one."""
    return int(tunnel.url.rpartition(':')[2])


class TcpRecord(Record):
    """What observers are told of a visitor's connection."""
    __slots__ = ('sent', 'size', 'facts')

    def __init__(self, number: int, began: float, target: str, visitor: str) -> None:
        super().__init__(number, began, 'TCP', target)
        self.visitor, self.sent, self.size = visitor, 0, 0
        self.facts = UNSERVED

    def upward(self, data: bytes) -> None:
        """Count DATA of the visitor."""
        self.sent += len(data)

    def downward(self, data: bytes) -> None:
        """Count DATA of the app."""
        self.size += len(data)


class TcpPorts(Kind):
    """The ports of raw TCP tunnels, on a server."""

    def __init__(self, server: Server, listening: Listening, host: str,
                 ports: Sequence[int]) -> None:
        """Bind PORTS of HOST, as they are needed."""
        self._server, self._listening, self._host, self._ports = server, listening, host, ports
        self._inherited = {port: listening.take(host, port)     # until their clients are back
                           for port in tuple(listening.inherited) if port in ports}
        # Who has which port; its sockets that nobody comes in by yet, and its doors.
        self._at: dict[int, tuple[Tunnel, Sockets, list[asyncio.AbstractServer]]] = {}
        server.admission.kinds['tcp'] = self
        server.runtime.swept.add(self)
        server.tunnels.on_forget.append(self._close)

    def sweep(self, now: float, woke_up: bool) -> None:
        """Let go of ports that were passed on."""
        while self._inherited and not self._server.tunnels.starting:    # nobody came back for it
            for sock in self._inherited.popitem()[1]:
                sock.close()

    async def free(self, tunnel: Tunnel) -> bool:
        if not tunnel.url:
            return False
        key = f'tcp:{port_of(tunnel)}'
        self._close(tunnel)
        admission = self._server.admission
        return await admission.leases.save(admission.leases.free(key))

    async def open(self, tunnel: Tunnel) -> None:
        _, bound, doors = self._at[port_of(tunnel)]
        while bound:
            doors.append(await self._server.doors.open(
                bound.pop(), functools.partial(self._serve, tunnel)))

    def _allowed(self, asked: Candidate) -> list[int]:
        return [port for port in self._ports if port in asked.grant.ports]

    def check(self, asked: Candidate) -> None:
        allowed = self._allowed(asked)
        port = port_of(asked.tunnel) if asked.tunnel.url else asked.hello.port
        if not allowed or (port and port not in allowed):
            raise Refused(403, 'bad_port', 'for raw TCP this server offers you ' + (
                f'ports {allowed[0]} to {allowed[-1]}; choose one of them' if allowed else
                'no ports'))

    async def place(self, asked: Candidate) -> None:
        """Bind the port asked for, the old one, or a free one."""
        server, hello = self._server, asked.hello
        owner = asked.owner if hello.port else asked.prover
        for port in self._candidates(asked, owner):
            if port in self._at:
                old = self._at[port][0]
                if old.members:
                    continue
                self._close(old)
            try:
                sockets = (self._inherited.pop(port, None)
                           or self._listening.take(self._host, port))
            except OSError:
                continue        # another program listens there
            try:
                await server.admission.leases.lease(f'tcp:{port}', owner, asked)
            except LocaltunnelError:
                for sock in sockets:
                    sock.close()
                raise
            asked.tunnel.url = f'tcp://{server.domain}:{port}'
            self._at[port] = asked.tunnel, sockets, []
            server.visitors.reserved += len(sockets)
            return
        raise Refused(409, 'port_taken', f'port {hello.port} is taken; choose another port'
                      if hello.port else 'no port for raw TCP is free here; try again later')

    def _candidates(self, asked: Candidate, owner: str) -> Iterable[int]:
        """Ports to try: the old one, or one that is free, at last one whose client is away."""
        leases, hello, allowed = self._server.admission.leases, asked.hello, self._allowed(asked)
        now, may = time.time(), frozenset(allowed)
        start = int.from_bytes(hello.proof[:4], 'big') % len(allowed)
        ports = [(lease.used, int(name[4:]), lease.owner)
                 for name, lease in leases.by_name.items() if name.startswith('tcp:')]
        ports.sort()            # the one that was used long ago comes first
        wanted = [hello.port] if hello.port else [
            *(port for _, port, whose in ports if whose == owner), *allowed[start:],
            *allowed[:start]]
        for port in wanted:
            if port in may and leases.owner(f'tcp:{port}', now) in (None, owner):
                yield port
        if not hello.port:
            leases.check_stranger(asked)        # before somebody loses a port for it
            leases.check_limits(owner, asked.grant.digest, now)
            yield from (port for _, port, _ in ports if port in may)

    def _close(self, tunnel: Tunnel) -> None:
        """TUNNEL has no port any more, if it had one."""
        if tunnel.kind == 'tcp' and tunnel.url:
            _, bound, doors = self._at.pop(port_of(tunnel))
            for sock in bound:          # its client was refused at the last moment
                sock.close()
            for door in doors:
                self._server.doors.close_one(door)
            self._server.visitors.reserved -= len(bound) + len(doors)
            tunnel.url = ''

    async def _serve(self, tunnel: Tunnel, connection: Connection) -> None:
        """One visitor."""
        server, stream = self._server, None
        visitor = server.visitors.enter(connection)
        record = TcpRecord(0, server.runtime.now(), tunnel.url, visitor.address)
        try:
            if visitor.refusal:
                raise visitor.refusal.again()
            if server.tunnels.bars:
                server.tunnels.bars.check_visitor(tunnel.name, visitor.address)
            stream, _ = (server.tunnels.open_stream(tunnel.key, visitor)
                         or await server.tunnels.waits.for_stream(tunnel.key, visitor))
            record.facts, record.status = stream.facts, 200
            visitor.begin(stream)
            await stream.write(visitor.address.encode())
            await join(connection, stream, [record.upward], [record.downward])
        except (LocaltunnelError, OSError) as e:
            record.status, record.why = getattr(e, 'status', record.status), str(e)
            connection.reset(CANCELLED, record.why)
        except asyncio.CancelledError:      # the server ends
            connection.reset(CANCELLED, 'the server has shut down')
            raise
        finally:
            server.visitors.leave(visitor)
            connection.close()
            if stream:
                stream.close()
            server.log.exchange(record, server.runtime.now() - record.began)


class RawTcp(Annex):
    """Tunnels of bytes."""
    title = 'raw TCP'

    def client_options(self, add: Add) -> None:
        add('--tcp', action='store_true', help='carry raw TCP instead of HTTP')
        add('--tcp-port', type=port_number, metavar='PORT',
            help='carry raw TCP, on this public port')

    def server_options(self, add: Add) -> None:
        add('--tcp-ports', type=port_range, default=range(0), metavar='A-B',
            help='for raw TCP (none)')

    def target(self, args: Args) -> Target | None:
        text = args.target
        if not args.tcp and args.tcp_port is None:
            return None
        if '/' in text or text == 'echo' or text.startswith('unix:'):
            raise UsageError(f'raw TCP leads to PORT or HOST:PORT, not to {text!r}')
        for option in 'name', 'auth':
            if getattr(args, option, None):
                raise UsageError(f'--{option} is for HTTP, not for --tcp')
        app = parse_target(text)
        return Target('tcp', app.host, app.port, kind='tcp', public_port=args.tcp_port or 0)

    def at_client(self, args: Args, app: App, address: ServerAddress) -> None:
        app.upstreams.dialers['tcp'] = app.upstreams.dialers['http']
        app.kinds['tcp'] = functools.partial(self.serve, app)

    async def at_server(self, args: Args, server: Server) -> None:
        TcpPorts(server, args.listening, args.bind, args.tcp_ports)

    @staticmethod
    async def serve(app: App, stream: Stream) -> None:
        """Serve one stream of raw bytes, which opens with the visitor's address."""
        visitor = printable(stream.read_nowait(MAX_PAYLOAD).decode('latin-1'))
        app.exchanges += 1
        record = TcpRecord(next(app.runtime.numbers), app.runtime.now(), visitor, visitor)
        try:
            upstream = await app.connect()
            stream.on_lost = upstream.abort
            record.status = 200
            app.under_way[record] = False
            app.tell_pending(record, 200)
            await join(upstream, stream, [record.downward], [record.upward])
            upstream.close()
        except HopFailed as e:
            record.status, record.why = e.status, str(e)
            stream.reset(FAILED, record.why)
        finally:
            stream.close()
            app.under_way.pop(record, None)
            app.observer.exchange(record, app.runtime.now() - record.began)


# ------------------------------------------------------------------------------------------------
# 35. Folder and echo
#
# Two apps that need not be started: a folder, and one that answers requests with themselves.  One
# rule, `Site.shows`, decides what may be seen of a folder, for listings and for what is opened.
# ------------------------------------------------------------------------------------------------

# What browsers insist on, whatever the table of this system says.
CONTENT_TYPES = dict(word.split('=') for word in """.html=text/html .htm=text/html .css=text/css
.js=text/javascript .mjs=text/javascript .txt=text/plain .md=text/markdown .csv=text/csv
.json=application/json .map=application/json .webmanifest=application/manifest+json
.wasm=application/wasm .xml=application/xml .pdf=application/pdf .svg=image/svg+xml .png=image/png
.jpg=image/jpeg .jpeg=image/jpeg .gif=image/gif .webp=image/webp .avif=image/avif
.ico=image/x-icon .woff=font/woff .woff2=font/woff2 .ttf=font/ttf .otf=font/otf .mp4=video/mp4
.m4v=video/mp4 .webm=video/webm .mov=video/quicktime .ts=video/mp2t .mp3=audio/mpeg .m4a=audio/mp4
.ogg=audio/ogg .wav=audio/wav .m3u8=application/vnd.apple.mpegurl""".split())
_RANGE = re.compile('(?i)bytes=[ \t]*([0-9]{0,18})-([0-9]{0,18})[ \t]*')


# In a path below the folder, a part that is hidden, or looks like a key; whatever is below it, too.
# A sign after the ending makes it a copy (server.key.bak, server.key~) or, on Windows, the same.
HIDDEN = re.compile(r'[\\/]\.')
KEY_FILES = re.compile(r'(?i)[\\/]id_|\.(?:pem|key|p12|pfx|kdbx?|ppk|jks|keystore|env)(?![a-z0-9])')


class Site:
    """A folder as visitors see it: SPA answers paths that are not there with index.html."""

    def __init__(self, folder: str, all_files: bool = False, spa: bool = False) -> None:
        """ALL_FILES: even what is hidden or looks like a key."""
        self.root, self.spa, self._all = os.path.realpath(folder), spa, all_files

    def shows(self, path: str) -> bool:
        """Return True if PATH may be seen: it is in the folder, and no part of it is kept back."""
        if path == self.root or not path.startswith(os.path.join(self.root, '')):
            return path == self.root
        below = os.sep + path[len(self.root):]
        return self._all or not (HIDDEN.search(below) or KEY_FILES.search(below))

    def open(self, path: str) -> BinaryIO | None:
        """The regular file PATH, where what was opened may be seen; None for anything else."""
        try:
            f = open_file(path, NEVER)
        except (OSError, ValueError):
            return None
        real = os.path.realpath(path)
        with contextlib.suppress(OSError):      # it is gone
            if self.shows(real) and os.path.samestat(os.fstat(f.fileno()), os.stat(real)):
                return f
        f.close()
        return None

    def index(self, folder: str) -> str | None:
        """The page that stands for FOLDER, if there is one."""
        pages = (os.path.join(folder, name) for name in ('index.html', 'index.htm'))
        return next(filter(os.path.lexists, pages), None)

    def names(self, folder: str) -> list[str]:
        """What may be seen of FOLDER, folders with a slash.  Raises OSError."""
        paths = {name: os.path.join(folder, name) for name in sorted(os.listdir(folder))}
        return [name + '/' if os.path.isdir(path) else name for name, path in paths.items()
                if self.shows(path) and self.shows(os.path.realpath(path))]

    def keys(self) -> int:
        """How many names at the top are kept back because they look like keys."""
        with contextlib.suppress(OSError):      # it is gone
            names = [os.sep + name for name in os.listdir(self.root) if not self._all]
            return sum(bool(KEY_FILES.search(name)) and not HIDDEN.search(name) for name in names)
        return 0

    def stands_in(self, path: str, accept: str) -> bool:
        """Return True if index.html answers for PATH, which is not there: it may be a page."""
        last = urllib.parse.unquote(path.partition('?')[0]).rpartition('/')[2]
        return self.spa and '.' not in last and ('text/html' in accept or '*/*' in accept)


def precondition(fields: Any, etag: str, modified: float) -> int:
    """304 or 412 where FIELDS ask not to send a file MODIFIED then, else 200 (RFC 9110 13)."""
    def since(name: str) -> float:
        """When the date in the field NAME was."""
        with contextlib.suppress(ValueError):
            return read_date(fields[name])
        return NEVER if name == 'If-Unmodified-Since' else -NEVER       # no date

    def named(name: str) -> bool:
        """True if the field NAME lists this file; If-Match takes no weak tags (RFC 9110 13.1.1)."""
        tags = {tag.strip() for tag in fields[name].split(',')}
        return bool(tags & ({etag, '*'} if name == 'If-Match' else {etag, f'W/{etag}', '*'}))
    if (not named('If-Match') if 'If-Match' in fields else
            modified > since('If-Unmodified-Since')):
        return 412
    if 'If-None-Match' in fields:
        return 304 if named('If-None-Match') else 200
    return 304 if modified <= since('If-Modified-Since') else 200


def part_of(fields: Any, size: int, validators: Sequence[str]) -> tuple[int, int] | None:
    """(first byte, end) of the one range that is asked for; None: all; nothing: none of it."""
    match = _RANGE.fullmatch(fields.get('Range', ''))
    if not match or fields.get('If-Range', validators[0]) not in validators:
        return None
    first, last = match.groups()
    if not first:
        if not last or int(last) and not size:
            return None
        return max(0, size - int(last)), size
    if last and int(last) < int(first):
        return None
    return int(first), min(size, int(last) + 1 if last else size)


def send_head(handler: Any, code: int, left: int, fields: Mapping[str, str]) -> None:
    """Send the head of an answer with FIELDS, after which HANDLER has LEFT bytes to send."""
    handler.left = left
    handler.send_response(code)
    for name, value in fields.items():
        handler.send_header(name, value)
    handler.end_headers()


def send_file(handler: Any, f: BinaryIO) -> BinaryIO | None:
    """Send the head for F; return it where some of it is to follow."""
    status, asked, fields = os.fstat(f.fileno()), handler.headers, {}
    size, modified = status.st_size, handler.date_time_string(status.st_mtime)
    etag = f'"{status.st_mtime_ns:x}-{size:x}"'
    code = precondition(asked, etag, int(status.st_mtime))
    part = part_of(asked, size, (etag, modified)) if (
        code == 200 and handler.command == 'GET') else None
    first, end = part or (0, size)
    if part:
        code = 206 if end > first else 416
    follows = code in (200, 206)
    left = end - first if follows else 0
    if follows:
        fields['Content-Type'] = handler.guess_type(f.name)
    if part:
        fields['Content-Range'] = f'bytes {first}-{end - 1}/{size}' if left else f'bytes */{size}'
    if code != 304:
        fields['Content-Length'] = str(left)
    send_head(handler, code, left, {**fields, 'ETag': etag, 'Last-Modified': modified,
                                    'Accept-Ranges': 'bytes'})
    if follows:
        f.seek(first)
        return f
    f.close()
    return None


def listing(names: Iterable[str], path: str) -> bytes:
    """A page with the NAMES in a folder, which is asked for as PATH."""
    items = ''.join(f'<li><a href="{urllib.parse.quote("./" + n, errors="surrogatepass")}">'
                    f'{html.escape(n)}</a>\n' for n in names)
    title = html.escape(urllib.parse.unquote(path))
    return PAGE.format(title=title, text=f'<ul>\n{items}</ul>').encode('utf-8', 'surrogateescape')


def send_whole(handler: Any, code: int, page: bytes, **fields: str) -> BinaryIO:
    """Send the head of an answer that is made here, PAGE, with FIELDS; return what follows it."""
    send_head(handler, code, len(page), {**fields, 'Content-Length': str(len(page))})
    return io.BytesIO(page)


def send_on(handler: Any, path: str, query: str) -> BinaryIO:
    """Send a visitor of the folder PATH on to it with its slash, and to no other site."""
    path = path.lstrip('/\\')       # two of either are a host to browsers
    return send_whole(handler, 301, b'', Location=f'/{path}/{query}')


def folder_handler(site: Site) -> Any:
    """A class that serves what may be seen of SITE."""
    import http.server

    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'
        error_message_format = PAGE.format(title='%(code)d %(message)s', text='<p>%(explain)s.</p>')
        left = 0                # bytes of the body that are yet to be sent
        extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, **CONTENT_TYPES}

        def translate_path(self, path: str) -> str:
            """Return the file for PATH, or one that does not exist."""
            found = super().translate_path(path)
            real = os.path.realpath(found) if '\0' not in found else ''
            seen = site.shows(found) and site.shows(real)
            return found if seen else os.path.join(site.root, '.', 'no such file', '')

        def send_head(self) -> Any:
            """The head of the answer; what is to be copied after it, of which `left` bytes."""
            found, (path, mark, query) = self.translate_path(self.path), self.path.partition('?')
            page: str | None = found
            if os.path.isdir(found):
                page = site.index(found)
                if not path.endswith('/') and (page or not site.spa):
                    return send_on(self, path, mark + query)
                if not (page or site.spa):
                    with contextlib.suppress(OSError):      # it can't be read
                        return send_whole(self, 200, listing(site.names(found), path),
                                          **{'Content-Type': HTML})
            f = site.open(page) if page else None
            if f is None and site.stands_in(path, self.headers.get('Accept', '*/*')):
                f = site.open(os.path.join(site.root, 'index.html'))
            return send_file(self, f) if f else self.send_error(404, 'File not found')

        def copyfile(self, source: Any, outputfile: Any) -> None:
            """What was promised and no more, though the file grows; less ends the connection."""
            while self.left:
                piece = source.read(min(self.left, MAX_PAYLOAD))
                if not piece:
                    raise ConnectionError('the file became shorter')
                outputfile.write(piece)
                self.left -= len(piece)

        def guess_type(self, path: Any) -> str:
            form = super().guess_type(path)
            return form + '; charset=utf-8' if form.startswith('text/') else form

        def log_message(self, *args: Any) -> None:
            """Log nothing: the tunnel has its own log."""
    return Handler


def serve_folder(site: Site) -> socket.socket:
    """A connection to what serves SITE, with listings, in a thread of its own."""
    handler, (ours, theirs) = folder_handler(site), socket.socketpair()

    def serve() -> None:
        with theirs, contextlib.suppress(OSError):      # the visitor may go away
            handler(theirs, ('127.0.0.1', 0), None, directory=site.root)
    threading.Thread(target=serve, daemon=True).start()
    return ours


MAX_ECHO = 1 * MIB              # of a request that the target `echo` sends back
ECHO_DELAY = 60.0               # seconds at most that it waits: webhook senders give up sooner


def wished(target: bytes) -> tuple[int, float]:
    """Return (status, delay) as the query of TARGET chooses the answer of `echo`.

    Raises HopFailed.
    """
    query = dict(urllib.parse.parse_qsl(target.decode('latin-1').partition('?')[2]))
    status, delay = query.get('status', '200'), query.get('delay', '0')
    if not re.fullmatch('[2-5][0-9][0-9]', status) or int(status) not in {*http.HTTPStatus}:
        raise HopFailed(400, 'status takes one that HTTP knows, from 200 on', hop='app')
    if not re.fullmatch('[0-9]{1,2}([.][0-9]{1,9})?', delay) or float(delay) > ECHO_DELAY:
        raise HopFailed(400, f'delay takes 0 to {ECHO_DELAY:.0f} seconds', hop='app')
    return int(status), float(delay)


def echoed(request: Request, head: bytes, body: bytes) -> tuple[str, bytes]:
    """Return (content type, text) of a REQUEST, as JSON where Accept names that."""
    if b'application/json' not in request.get(b'accept').lower():
        return 'text/plain; charset=utf-8', head + body
    try:
        text, encoding = body.decode(), 'utf-8'
    except UnicodeDecodeError:
        text, encoding = base64.b64encode(body).decode(), 'base64'
    path, _, query = request.target.decode('latin-1').partition('?')
    fields = [line.split(':', 1) for line in request.block.decode('latin-1').split('\r\n')[:-1]]
    return 'application/json', json.dumps({
        'method': request.method.decode(), 'target': request.target.decode('latin-1'),
        'path': path, 'query': urllib.parse.parse_qsl(query, keep_blank_values=True),
        'headers': [[name, value.strip(' \t')] for name, value in fields],
        'body': text, 'encoding': encoding}, indent=1).encode() + b'\n'


async def echo(connection: Connection) -> None:
    """Answer requests with themselves, to show what an app would get.

    `?status=503&delay=2` choose the answer, to see how a sender of webhooks tries again.
    """
    try:
        while True:
            head = await read_head(connection, BODY_IDLE)
            if head is None:
                break
            request = parse_request(head)
            if b'100-continue' in head.lower():
                await connection.write(b'HTTP/1.1 100 Continue\r\n\r\n')
            body = await read_whole(body_reader(connection, request.length), MAX_ECHO)
            try:
                if len(body) > MAX_ECHO:
                    raise HopFailed(413, f'echo sends back no more than {MAX_ECHO} bytes',
                                    hop='app')
                status, delay = wished(request.target)
            except HopFailed as e:
                await Failures().failed(e, request.get(b'accept')).write(
                    connection, 'Connection: close')
                break
            await asyncio.sleep(delay)
            form, text = echoed(request, head, body)
            if status in (204, 205, 304):
                text = b''
            await Own(status, form, [text], method=request.method).write(connection)
        await connection.linger()
    except (LocaltunnelError, OSError):
        connection.abort()


class FolderAndEcho(Annex):
    """Their targets, and how to connect to them."""
    title = 'a folder'

    def client_options(self, add: Add) -> None:
        add('--all-files', action='store_true',
            help='serve hidden files, and those that look like keys, too')
        add('--spa', action='store_true', help='answer paths that are not there with index.html')

    def target(self, args: Args) -> Target | None:
        text = args.target
        if text == 'echo':
            return Target('echo', text=text)
        if re.match('[0-9]+$|unix:.|.*://', text) or not (
                os.path.isdir(text) or '/' in text or '\\' in text):
            return None
        if not os.path.isdir(text):
            raise UsageError(f'there is no folder {text}')
        return Target('folder', path=text, text=text)

    def at_client(self, args: Args, app: App, address: ServerAddress) -> None:
        if app.target.scheme == 'folder':
            site = Site(app.target.path, args.all_files, args.spa)
            app.upstreams.dialers['folder'] = functools.partial(self.dial_folder, app.runtime, site)
            self.look(site, app.observer)
        elif args.all_files or args.spa:
            raise UsageError('--all-files and --spa are for a folder, and '
                             f'{app.target.text} is something else')
        app.upstreams.dialers['echo'] = dial_inside(app.runtime, echo)

    @staticmethod
    def look(site: Site, observer: ClientObserver) -> None:
        """Tell the user what of SITE visitors will miss."""
        keys = site.keys()
        if keys:
            observer.hint(
                f'{keys} files that look like keys are not served; --all-files serves them'
                if keys > 1 else
                'a file that looks like a key is not served; --all-files serves it')
        if site.spa and not os.path.exists(os.path.join(site.root, 'index.html')):
            observer.hint(f'there is no index.html in {site.root} yet, which --spa answers with; '
                          'until it is there, visitors get 404')

    @staticmethod
    async def dial_folder(runtime: Runtime, site: Site, target: Target) -> Connection:
        """A connection to what serves SITE, the folder TARGET."""
        _, connection = await runtime.loop.create_connection(
            lambda: Connection(runtime), sock=serve_folder(site))
        return connection


# ------------------------------------------------------------------------------------------------
# 36. Host header
#
# What app and visitor are told of each other's address, and of a base path; and a hint where an app
# refuses the tunnel's name.
# ------------------------------------------------------------------------------------------------

URL_END = rb'(?=[/?#>"\']|[ \t]*$)'     # ends an origin, or a whole path


def replaced(block: bytes, names: bytes, old: bytes, new: bytes) -> bytes:
    """Return BLOCK with NEW for the pattern OLD where it begins a URL in the fields of NAMES."""
    start = rb'(^(?i:refresh):[^=]*=[ \t"\']*|^[^:]*:[ \t]*|<)'
    return re.sub(rb'(?im)^(?:%b):[^\r]*' % names, lambda line: re.sub(
        start + old, lambda m: m.group(1) + new, line.group()), block)


class Addresses(Rewrite):
    """What app and visitor are told about each other's address (--host-header) and a base path.

    With `rewrite` the app sees its own address instead of the public one.  A foreign Origin passes
    untouched: the app's own check against forged requests must keep working.  Visitors see nothing
    of the base path: to them what is below it is the whole site.
    """

    def __init__(self, target: Target, value: str) -> None:
        self._rewrite = value == 'rewrite'
        self._base = target.path.encode() if target.scheme in ('http', 'https') else b''
        self._host = (target.authority if self._rewrite else value).encode('latin-1')
        scheme = 'https' if target.scheme == 'https' else 'http'
        self._own = f'{scheme}://{target.authority}'.encode()
        self._domain = re.compile(rb'(?i);[ \t]*domain=\.?' + re.escape(target.host.encode())
                                  + rb'(?=[ \t]*(?:;|$))')

    def of_request(self, request: Request, block: bytes) -> bytes:
        if self._base and request.target != b'*':
            if leads_out(request.target):
                raise HopFailed(400, f'this path leads out of {self._base.decode()}', hop='client')
            request.target = self._base + request.target
        if self._host:
            block = re.sub(rb'(?im)^(host:)[^\r]*', lambda m: m.group(1) + b' ' + self._host, block)
        public = self._public(request)
        old = b'(?i:%b)' % re.escape(public) + URL_END
        if self._rewrite:
            block = re.sub(rb'(?im)^x-forwarded-(?:host|proto):.*\n', b'', block)
            block = replaced(block, rb'(?:sec-websocket-)?origin', old, self._own)
        if self._rewrite or self._base:
            own = (self._own if self._rewrite else public) + self._base
            block = replaced(block, rb'referer|destination|if', old, own)
            if self._base:
                block = replaced(block, rb'destination|if', rb'(?=/(?!/))', self._base)
                self._check_destination(block, own)
        return block

    def _check_destination(self, block: bytes, own: bytes) -> None:
        """Keep MOVE and COPY inside the base path, too.  Raises HopFailed."""
        for url in re.findall(rb'(?im)^destination:[ \t]*([^\r]*)', block):
            inside = re.match(rb'(?:%b|%b)((?:[/?].*)?$)' % (re.escape(own), re.escape(self._base)),
                              url)
            if not inside or leads_out(inside.group(1)):
                raise HopFailed(400, f'Destination leads out of {self._base.decode()}',
                                hop='client')

    def of_response(self, request: Request, block: bytes) -> bytes:
        public, own, base = self._public(request), re.escape(self._own), re.escape(self._base)
        if self._rewrite:
            block = re.sub(rb'(?im)^set-cookie:[^\r]*', lambda m: self._domain.sub(b'', m.group()),
                           block)
            block = replaced(block, rb'access-control-allow-origin', b'(?i:%b)' % own + URL_END,
                             public)
        if base:        # an app that was told https may still say http
            hosts = re.escape(request.host), re.escape(public.partition(b'//')[2])
            own += rb'|(?:https?:)?//(?:%b|%b)' % hosts
            block = re.sub(rb'(?im)^set-cookie:[^\r]*', lambda m: re.sub(
                rb'(;[ \t]*(?i:path)[ \t]*=[ \t]*)%b(?:/|(?=[ \t]*(?:;|$)))' % base, rb'\1/',
                m.group()), block)
        if self._rewrite or base:
            names = rb'(?:content-)?location|refresh|link'
            block = replaced(block, names, b'(?i:%b)%b%b' % (own, base, URL_END), public)
        if base:        # `//` would begin another host
            block = replaced(block, names, rb'%b(?:[/\\]+|%b)' % (base, URL_END), b'/')
        return block

    @staticmethod
    def _public(request: Request) -> bytes:
        """Return the public origin that the server names."""
        return (request.get(b'x-forwarded-proto') or b'http') + b'://' + (
            request.get(b'x-forwarded-host') or request.host)


# What development servers say in a 400 or 403 to a Host or Origin that they do not know.
STRANGERS = {b'Blocked request. This host': 'Vite', b'Invalid Host header': 'webpack-dev-server',
             b'Invalid Host/Origin header': 'webpack-dev-server', b'DisallowedHost': 'Django',
             b'Origin checking failed': 'Django', b'Blocked host': 'Rails',
             b'Unauthorized request from': 'Next', b'403 : Forbidden': 'Jupyter',
             b'Cross origin websockets not allowed': 'Jupyter or another Tornado app'}
REFUSED = 400, 403
STRANGER_IN_200 = 19        # the length of `Invalid Host header`: some say it with a 200
LONGEST_WORDS = 64          # of them all, at most


class Strangers(ClientObserver):
    """Finds words by which an app refuses this tunnel, and gives the user a hint, once."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._hinted = False

    def exchange(self, exchange: Record, seconds: float) -> None:
        if (exchange.status in REFUSED or exchange.size == STRANGER_IN_200) and isinstance(
                exchange, Exchange) and isinstance(exchange.answer, WholeBody):
            self.look(exchange.request, exchange.answer.whole)

    def tap(self, exchange: Exchange) -> Tap | None:
        """What is to be shown the body of a response, where that may hold such words."""
        if exchange.status not in REFUSED and (
                not isinstance(exchange.answer, Body) or exchange.answer.left != STRANGER_IN_200):
            return None
        rest, left = b'', MAX_PAYLOAD

        def look(piece: bytes) -> None:
            nonlocal rest, left
            if left > 0 and not self._hinted:
                text, left = rest + piece, left - len(piece)
                self.look(exchange.request, text)
                rest = text[-LONGEST_WORDS:]
        return look

    def look(self, request: Request, said: bytes) -> None:
        """Give the hint if the app refused REQUEST, to which it SAID this."""
        server = next((server for words, server in STRANGERS.items() if words in said), '')
        if said == b'Unauthorized' and b'/_next/' in request.target:
            server = 'Next'     # a word for what its pages load is all that even a WebSocket gets
        hint = speaks_tls(self._app.target.text) if WANTS_TLS.search(said) else server and (
            f'{server} refused the name of this tunnel; start the client with --host-header '
            'rewrite, or allow the name in the settings of your app')
        if hint and not self._hinted:
            self._hinted = True
            self._app.observer.hint(hint)


def host_to_send(text: str) -> str:
    """For argparse: `rewrite`, or a host, perhaps with a port."""
    if text and not re.fullmatch(r'[A-Za-z0-9._~:\[\]-]+', text):
        raise argparse.ArgumentTypeError('it takes `rewrite`, or a host, perhaps with a port')
    return text


class HostHeader(Annex):
    """--host-header, base paths and hints."""
    title = 'the address that the app sees'

    def client_options(self, add: Add) -> None:
        add('--host-header', type=host_to_send, metavar='VALUE', help='send VALUE as Host to the '
            'app; `rewrite`: the app believes that it is visited on its own address')

    def at_client(self, args: Args, app: App, address: ServerAddress) -> None:
        if args.host_header and app.target.kind != 'http':
            raise UsageError('--host-header is for HTTP, not for --tcp')
        if args.host_header or app.target.port and app.target.path:
            app.rewrites.append(Addresses(app.target, args.host_header or ''))
        if args.host_header is None:
            strangers = Strangers(app)
            app.response_taps.append(strangers.tap)
            app.strange.append(strangers.look)
            observers: Any = Observers(app.observer, strangers)
            app.observer = observers


# ------------------------------------------------------------------------------------------------
# 37. Outgoing proxy
#
# The way to the server where only a proxy leads out.
# ------------------------------------------------------------------------------------------------

def find_proxy(address: ServerAddress) -> urllib.parse.SplitResult | None:
    """Return the proxy that HTTPS_PROXY, ALL_PROXY and NO_PROXY name for ADDRESS, if any.

    Raises UsageError.
    """
    if is_loopback(address.site) or not any(name.lower().endswith('_proxy') for name in os.environ):
        return None
    import urllib.request
    proxies = urllib.request.getproxies_environment()
    proxy = proxies.get(address.scheme) or proxies.get('all', '')
    if not proxy or urllib.request.proxy_bypass_environment(    # type: ignore[attr-defined]
            address.site, proxies):
        return None
    try:
        parts = urllib.parse.urlsplit(proxy if '://' in proxy else 'http://' + proxy)
        if parts.scheme == 'http' and parts.hostname and (parts.port or 80):
            return parts
    except ValueError:
        pass
    raise UsageError("can't use the proxy of HTTPS_PROXY or ALL_PROXY; it must be http://HOST:PORT")


def connect_through(proxy: urllib.parse.SplitResult, host: str, port: int) -> socket.socket:
    """Return a socket to HOST:PORT through PROXY.  Blocks.  Raises LocaltunnelError."""
    import http.client
    where = f'{bracketed(host)}:{port}'
    headers = {'Host': where}
    if proxy.username:
        user = urllib.parse.unquote(f'{proxy.username}:{proxy.password or ""}')
        headers['Proxy-Authorization'] = 'Basic ' + base64.b64encode(
            user.encode(errors='surrogateescape')).decode()
    no_way = f'the proxy {proxy.hostname} did not connect to {where}: '
    connection = http.client.HTTPConnection(proxy.hostname or '', proxy.port or 80,
                                            timeout=CONNECT_TIMEOUT)
    with contextlib.closing(connection), contextlib.ExitStack() as failed:
        try:
            connection.request('CONNECT', where, headers=headers)
            sock: socket.socket = failed.enter_context(connection.sock.dup())
            answer = connection.getresponse()       # which may close its own socket
        except (OSError, http.client.HTTPException) as e:
            raise LocaltunnelError(no_way + printable(plainly(e))) from e
        if answer.status // 100 != 2:
            schemes = ', '.join(value.split(' ')[0] for value in
                                answer.headers.get_all('Proxy-Authenticate', []))
            raise LocaltunnelError(no_way + printable(f'{answer.status} {answer.reason}' + (
                f'; it wants {schemes}, and this program knows only Basic, with '
                'http://USER:PASSWORD@HOST:PORT' if schemes else ''))[:500])
        failed.pop_all()
    sock.setblocking(False)
    return sock


class OutgoingProxy(Annex):
    """The way out that the environment names."""

    def at_client(self, args: Args, app: App, address: ServerAddress) -> None:
        proxy = find_proxy(address)
        if proxy:
            through = functools.partial(connect_through, proxy)
            address.route = functools.partial(app.runtime.loop.run_in_executor, None, through)


# ------------------------------------------------------------------------------------------------
# 38. Certificates
#
# TLS at a server, with a certificate that it is given, or one of its own that clients alone know.
# ------------------------------------------------------------------------------------------------

class Certificate(Tls):
    """The one in two files, read again when they change."""

    def __init__(self, cert: str, key: str, port: int = 0, pin: str = '') -> None:
        """Raises UsageError."""
        super().__init__(port, pin)
        self._files = cert, key
        self._seen = stamp_of(cert, key)
        self.load(cert, key)

    def changed(self) -> bool:
        return stamp_of(*self._files) not in ([], self._seen)

    def reload(self) -> str | None:
        self._seen = stamp_of(*self._files)
        try:
            self.load(*self._files, open_file)      # a pipe has nothing more, and may never end
        except UsageError as e:
            return f'{e}; the old certificate stays'
        return None


def self_signed(folder: str, domain: str) -> tuple[str, str, str] | None:
    """Return (certificate, key, SHA256) for sessions, from openssl in FOLDER; None without it."""
    import tempfile
    cert, key = os.path.join(folder, 'self-signed.pem'), os.path.join(folder, 'self-signed.key')
    if not (os.path.exists(cert) and os.path.exists(key)):
        try:
            with tempfile.TemporaryDirectory(dir=folder) as private:
                made = os.path.join(private, 'key'), os.path.join(private, 'cert')
                openssl('req', '-x509', '-nodes', '-days', '3650', '-newkey', 'ec', *CURVE, '-subj',
                        f'/CN={domain}'[:64], '-keyout', made[0], '-out', made[1])
                os.chmod(made[0], 0o600)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(cert)     # first: a crash leaves no certificate to another key
                os.replace(made[0], key)
                os.replace(made[1], cert)
        except (OSError, LocaltunnelError):
            return None
    try:
        with open(cert, encoding='ascii') as f:
            return cert, key, digest_of(ssl.PEM_cert_to_DER_cert(f.read()))
    except (OSError, ValueError) as e:
        raise UsageError(f'{cert} is damaged ({e}); remove it, and a new one is made') from e


class Certificates(Annex):
    """--cert and --key, or a certificate of our own."""
    title = 'https'

    def server_options(self, add: Add) -> None:
        add('--cert', metavar='FILE', help='certificate for https, with its chain')
        add('--key', metavar='FILE', help='private key of the certificate')

    async def at_server(self, args: Args, server: Server) -> None:
        if bool(args.cert) != bool(args.key):
            raise UsageError('--cert and --key go together; add '
                             + ('--key FILE' if args.cert else '--cert FILE'))
        if server.tls and args.cert:
            raise UsageError('--cert and --key give a certificate, and so does --acme; take one')
        if server.tls:
            return
        cert, key, pin = args.cert, args.key, ''
        if not cert:
            made = None if is_loopback(args.domain) or args.trust_proxy else self_signed(
                args.state, args.domain)
            if not made:
                return
            cert, key, pin = made
            with contextlib.suppress(OSError):      # Certificate says what is wrong
                read_secret(key, 'may pose as this server; remove it to get another, with a new '
                            '--pin', lambda text: server.log.note(f'warning: {text}'))
        try:
            sockets = args.listening.at(args.bind, args.tls_port)
        except LocaltunnelError:
            if not pin:
                raise
            return              # it was only a courtesy
        server.tls = shown = Certificate(cert, key, sockets[0].getsockname()[1], pin)
        args.sources.all.append(shown)
        for sock in sockets:
            TlsDoor(server, sock, shown.context)


# ------------------------------------------------------------------------------------------------
# 39. Certificates by ACME
#
# https without a hand's turn (--acme): the authority (RFC 8555), the certificate that is shown, and
# the keeper, who gets the best one that the records allow, and renews it.  Keys, signatures and
# requests for certificates are made by the openssl program; no key is ever among its arguments.
# What an authority answers is not trusted further than its certificate.
# ------------------------------------------------------------------------------------------------

# The openssl program: keys, signatures, requests for certificates.

# The whole of its configuration: the system's may be missing, and old ones know no -addext.
REQUEST = '[req]\ndistinguished_name=none\nreq_extensions=more\n[none]\n[more]\nsubjectAltName='
# In a certificate, what comes before the key of its authority and its own number, and their sizes.
ID_PARTS = rb'\x06\x03\x55\x1d\x23\x04.\x30.\x80(.)', rb'\xa0\x03\x02\x01\x02\x02(.)'
NOT_PROVED = 'not proved'       # the code of an AcmeError where a proof was not accepted


class AcmeError(LocaltunnelError):
    """A certificate can't be had.  WAIT seconds before asking again; CODE is the authority's."""

    def __init__(self, text: str, code: str = '', wait: float = 0.0) -> None:
        super().__init__(text)
        self.code, self.wait = code, wait


async def by_openssl(*words: str, given: bytes = b'') -> bytes:
    """The same as `openssl`, in a thread."""
    return await asyncio.get_running_loop().run_in_executor(
        None, functools.partial(openssl, *words, given=given))


async def make_request(folder: str, names: Sequence[str]) -> tuple[bytes, bytes]:
    """A new P-256 key (PEM), and a request (DER) for a certificate of it for NAMES, without a CN.

    The key is in FOLDER meanwhile, for this user alone.  Raises LocaltunnelError and OSError.
    """
    import tempfile
    said = ','.join(f'{"IP" if is_address(name) else "DNS"}:{name}' for name in names)
    with tempfile.TemporaryDirectory(dir=folder) as private:
        config, key = (os.path.join(private, name) for name in ('config', 'key'))
        write_secret(config, f'{REQUEST}{said}\n'.encode())
        request = await by_openssl('req', '-new', '-newkey', 'ec', *CURVE, '-nodes', '-subj', '/',
                                   '-config', config, '-keyout', key, '-outform', 'DER')
        with open(key, 'rb') as f:
            return f.read(), request


def raw_signature(der: bytes) -> bytes:
    """The 64 bytes that JWS wants (RFC 7518 3.4) of a signature that openssl wrote as DER."""
    size = der[3]
    one, other = der[4:4 + size], der[6 + size:6 + size + der[5 + size]]
    return b''.join(int.from_bytes(part, 'big').to_bytes(32, 'big') for part in (one, other))


def base64url(data: bytes) -> str:
    """DATA as JOSE and ACME write it (RFC 7515 2)."""
    return base64.urlsafe_b64encode(data).rstrip(b'=').decode()


def base64json(value: Any) -> str:
    return base64url(json.dumps(value).encode())


def renewal_id(path: str) -> str:
    """How authorities name the certificate in PATH (RFC 9773 4.1); '' where it has no such name."""
    parts = []
    with contextlib.suppress(OSError, ValueError, IndexError), open(path, encoding='ascii') as f:
        first = re.findall(f'(?s){ssl.PEM_HEADER}.*?{ssl.PEM_FOOTER}', f.read())[0]
        for before in ID_PARTS:         # a ValueError where one is not there
            _, size, rest = re.split(
                before, ssl.PEM_cert_to_DER_cert(first), maxsplit=1, flags=re.S)
            parts.append(base64url(rest[:size[0]]))
        return '.'.join(parts)
    return ''


# The authority.

ACME_PATIENCE = 30.0            # seconds for each of its answers
ACME_LARGEST = 1 * MIB          # of an answer
NONCE_TRIES = 5                 # a nonce may have been used up, or too old
POLL_FIRST, POLL_MOST = 0.5, 30.0       # seconds between looks at an order
LONGEST_WAIT = 7 * DAY          # that it may ask for: no limit of Let's Encrypt takes longer


async def fetch(runtime: Runtime, url: str, tls: ssl.SSLContext | None, body: str = '',
                form: str = '', to: str = '') -> tuple[Response, bytes]:
    """What URL answers, and its body; a BODY of type FORM is posted.  TO is dialled for its host.

    With TLS only https is spoken, else only http.  Raises AcmeError.
    """
    try:
        scheme, host, port, path = split_url(url, ('https' if tls else 'http',))
        return await asyncio.wait_for(ask_whole(
            connect(runtime, to or host, port, tls, host), authority(scheme, host, port),
            path or '/', *[f'Content-Type: {form}'] * bool(form), body=body.encode(),
            within=ACME_PATIENCE, most=ACME_LARGEST), ACME_PATIENCE)
    except (OSError, asyncio.TimeoutError, LocaltunnelError) as e:
        raise AcmeError(explain(e, url)) from e


def seconds_of(response: Response) -> float:
    """How long it wants not to be asked again: Retry-After, in seconds or as a date."""
    text = response.find(b'retry-after')
    try:
        seconds = float(text) if re.fullmatch('[0-9]+', text) else read_date(text) - time.time()
    except ValueError:
        return 0.0
    return min(max(0.0, seconds), LONGEST_WAIT)


def read_problem(document: Any, otherwise: str) -> tuple[str, str]:
    """(type, sentence, or OTHERWISE) of a complaint of an authority (RFC 7807, RFC 8555 6.7)."""
    problem = document if isinstance(document, dict) else {}
    parts = problem.get('subproblems') or [problem]
    said = '; '.join(str(part.get('detail') or '') for part in parts if isinstance(part, dict))
    return str(problem.get('type', '')).rpartition(':')[2], printable(said[:MAX_TEXT] or otherwise)


def read_time(text: str) -> float:
    """Unix seconds of TEXT as RFC 3339 writes them.  Raises ValueError."""
    text = re.sub(r'\.[0-9]+', '', text).replace('Z', '+00:00')
    return datetime.datetime.fromisoformat(text).timestamp()


class Authority:
    """One ACME server, and our account there.  Its methods raise AcmeError.

    They also raise what odd answers lead to: each is used as if it had the right form.
    """

    def __init__(self, runtime: Runtime, url: str, tls: ssl.SSLContext, folder: str,
                 publish: Callable[[str, str], None]) -> None:
        """URL is that of its directory; the key of our account is in FOLDER, or will be.

        PUBLISH is called with each token, and the proof that the authority wants to see for it.
        """
        self.url = url
        self.account = ''                       # our URL there, once we are known
        self.meta: dict[str, Any] = {}          # what it says of itself
        self._fetch = functools.partial(fetch, runtime, tls=tls)
        self._folder, self._publish = folder, publish
        self._directory: dict[str, Any] = {}    # its URLs, once it was read
        self._key = os.path.join(folder, 'acme-account.key')
        self._jwk: dict[str, str] = {}          # the account's public key
        self._nonce = ''                        # for the next request

    async def learn(self) -> None:
        """Read the directory."""
        response, said = await self._fetch(self.url)
        if response.status != 200:
            raise AcmeError(f'{self.url} answers {response.status}', wait=seconds_of(response))
        self._directory = json.loads(said)
        self.meta = self._directory.get('meta') or {}

    async def enter(self, mail: str, external: str) -> None:
        """Open the account, or find it; EXTERNAL is KID:HMAC of one that we have in another way."""
        await self.learn()
        if not os.path.exists(self._key):
            write_secret(self._key, await by_openssl('genpkey', '-algorithm', 'EC', *CURVE))
        public = await by_openssl('pkey', '-in', self._key, '-pubout', '-outform', 'DER')
        self._jwk = {'crv': 'P-256', 'kty': 'EC', 'x': base64url(public[-64:-32]),
                     'y': base64url(public[-32:])}      # in the order that a thumbprint wants
        wish: dict[str, Any] = {'termsOfServiceAgreed': True, 'contact': [f'mailto:{mail}']}
        if external:
            wish['externalAccountBinding'] = self._binding(external)
        self.account = ''
        response, _ = await self._post(self._directory['newAccount'], wish)
        self.account = response.find(b'location')

    def _proof(self, token: str) -> str:
        """The key authorization for TOKEN (RFC 8555 8.1)."""
        thumb = hashlib.sha256(json.dumps(self._jwk, separators=(',', ':')).encode()).digest()
        return f'{token}.{base64url(thumb)}'

    def _binding(self, external: str) -> dict[str, str]:
        """That the key is ours, signed with the secret of EXTERNAL (RFC 8555 7.3.4)."""
        kid, _, secret = external.partition(':')
        head = base64json({'alg': 'HS256', 'kid': kid, 'url': self._directory['newAccount']})
        body = base64json(self._jwk)
        key = base64.urlsafe_b64decode(secret + '=' * (-len(secret) % 4))
        return {'protected': head, 'payload': body, 'signature': base64url(
            hmac.digest(key, f'{head}.{body}'.encode(), 'sha256'))}

    async def _post(self, url: str, payload: Any = None) -> tuple[Response, Any]:
        """(response, document) for PAYLOAD, signed; None just reads."""
        body = '' if payload is None else base64json(payload)
        for _ in range(NONCE_TRIES):
            if not self._nonce:
                response, _ = await self._fetch(self._directory['newNonce'])
                self._nonce = response.find(b'replay-nonce')
            who = {'kid': self.account} if self.account else {'jwk': self._jwk}
            head = base64json({'alg': 'ES256', 'nonce': self._nonce, 'url': url, **who})
            der = await by_openssl('dgst', '-sha256', '-sign', self._key,
                                   given=f'{head}.{body}'.encode())
            response, said = await self._fetch(url, form='application/jose+json', body=json.dumps(
                {'protected': head, 'payload': body, 'signature': base64url(raw_signature(der))}))
            self._nonce = response.find(b'replay-nonce')
            document = json.loads(said) if 'json' in response.find(b'content-type') else said
            if 200 <= response.status < 300:
                return response, document
            code, why = read_problem(document, f'it answers {response.status}')
            if code != 'badNonce':
                break
        raise AcmeError(f'{self.url} says: {why}', code, seconds_of(response))

    async def _decided(self, url: str, wanted: str) -> dict[str, Any]:
        """What is at URL, once its status is the WANTED one."""
        pause = POLL_FIRST
        while True:
            response, document = await self._post(url)
            if document['status'] == wanted:
                return dict(document)
            if document['status'] not in ('pending', 'processing', 'ready'):
                parts = document, *document.get('challenges', ())
                error = next((part['error'] for part in parts if part.get('error')), None)
                _, why = read_problem(error, f'it is {document["status"]}')
                raise AcmeError(f'{self.url} did not accept the proof: {why}', NOT_PROVED)
            await asyncio.sleep(min(max(seconds_of(response), pause), POLL_MOST))
            pause = min(pause * 1.5, POLL_MOST)

    async def obtain(self, names: Sequence[str], method: str, profile: str, old: str) -> bytes:
        """A new key and a certificate for NAMES with its chain, PEM, proved by METHOD.

        It replaces the one whose renewal id is OLD.
        """
        known = 'renewalInfo' in self._directory
        wish = {'profile': profile, 'replaces': old if known else '', 'identifiers': [
            {'type': 'ip' if is_address(name) else 'dns', 'value': name} for name in names]}
        wish = {key: value for key, value in wish.items() if value}
        try:
            response, order = await self._post(self._directory['newOrder'], wish)
        except AcmeError as e:
            if 'replaces' not in wish or e.code == 'rateLimited':
                raise
            # It was replaced already, or is of another authority.
            return await self.obtain(names, method, profile, '')
        for url in order['authorizations']:
            await self._prove(url, method)
        place = response.find(b'location')
        order = await self._decided(place, 'ready')
        key, request = await make_request(self._folder, names)
        await self._post(order['finalize'], {'csr': base64url(request)})
        order = await self._decided(place, 'valid')
        _, chain = await self._post(order['certificate'])
        if not isinstance(chain, bytes):
            raise AcmeError(f'{self.url} sends something else than a certificate')
        return key + chain

    async def _prove(self, url: str, method: str) -> None:
        _, proof = await self._post(url)
        if proof['status'] == 'valid':
            return              # from an order before
        challenge = next((c for c in proof['challenges'] if c['type'] == method), None)
        if challenge is None:
            raise AcmeError(f'{self.url} takes no {method} for {proof["identifier"]["value"]}')
        self._publish(challenge['token'], self._proof(challenge['token']))
        await self._post(challenge['url'], {})
        await self._decided(url, 'valid')

    async def window(self, certificate: str) -> tuple[float, float]:
        """From when until when it wants CERTIFICATE, a renewal id, to be renewed, if it says so."""
        await self.learn()
        _, said = await self._fetch(f'{self._directory["renewalInfo"]}/{certificate}')
        found = json.loads(said)['suggestedWindow']
        return read_time(found['start']), read_time(found['end'])


# The certificate that is shown.

class AcmeTls(Tls):
    """Shows what there is to those whom it is for, and nobody a stand-in."""

    def __init__(self, path: str, port: int, trust: ssl.SSLContext) -> None:
        """PATH is the file with key and chain, one so that they always belong together.

        TRUST is for the authorities.
        """
        super().__init__(port)
        self.path, self.trust = path, trust
        self.look_now = asyncio.Event()         # SIGHUP came

    def _choose(self, connection: Any, name: str | None, context: Any) -> int | None:
        if name and not covers(self.validity[2], name):
            return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
        return super()._choose(connection, name, context)

    @property
    def names(self) -> list[str]:
        """Those for which it holds, now."""
        return self.validity[2] if time.time() < self.validity[1] else []

    def shows(self, host: str) -> bool:
        return covers(self.names, host)

    def reload(self) -> str | None:
        self.look_now.set()
        return None


# What it needs, and its keeper.

LETS_ENCRYPT = 'https://acme-v02.api.letsencrypt.org/directory'
CHALLENGES = '/.well-known/acme-challenge/'     # RFC 8555 8.3
LOOK_SOON, LOOK = 60.0, 12 * 3600.0     # seconds between looks: at records to come, at all else
LEAST_PAUSE = 1.0               # seconds between them, come what may
TRIALS = 0.0, 0.1, 0.4          # seconds before each: a predecessor may still answer for a moment
BACKOFF = (60.0, 600.0, 6000.0, DAY)    # seconds after the first failure, the second, ...
MOST_FAILED, FAILED_FOR = 4, 3600.0     # proofs that failed in an hour; Let's Encrypt takes five
ORDER_PATIENCE = 600.0          # seconds until an order is decided
SHORT_LIFE = 10 * DAY           # renewed when half of it is over; others, when a third is left


def words_for(error: BaseException) -> str:
    """What went wrong, in one sentence."""
    return (str(error) if isinstance(error, LocaltunnelError) else
            'the authority does not decide' if isinstance(error, asyncio.TimeoutError) else
            f"can't write {error.filename}: {error.strerror}" if isinstance(error, OSError) else
            f'the answer of the authority makes no sense ({type(error).__name__}: {error})')


def allows(value: str, authority: Authority, method: str) -> bool:
    """Return True if VALUE of a CAA record lets AUTHORITY issue to us, who prove it by METHOD."""
    issuer, *parameters = [part.strip() for part in value.split(';')]
    terms = {key.strip().lower(): text.strip() for key, _, text in (
        part.partition('=') for part in parameters)}
    return (issuer != '' and issuer in (authority.meta.get('caaIdentities') or [issuer])
            and method in re.split(' *, *', terms.get('validationmethods', method))
            and terms.get('accounturi', authority.account) == authority.account)


class Outside:
    """The domain as others see it: what is looked at before an authority is asked."""

    def __init__(self, args: Args, server: Server, zone: Zone) -> None:
        self._domain, self._server, self._port = str(args.domain), server, args.port
        self._zone = zone
        self._resolver = args.resolver or system_resolver() or ('', 0)      # an address needs none

    def show(self, token: str, proof: str) -> None:
        """Let PROOF be seen where TOKEN leads to, under any name, and its digest in DNS."""
        self._server.pages.everywhere[f'{CHALLENGES}{token}'.encode()] = lambda _: (
            'application/octet-stream', [proof.encode()])
        self._zone.texts.add(base64url(hashlib.sha256(proof.encode()).digest()))

    def hide(self) -> None:
        """Let nothing of it be seen any more."""
        self._zone.texts.clear()
        for path in tuple(self._server.pages.everywhere):
            if path.startswith(CHALLENGES.encode()):
                del self._server.pages.everywhere[path]

    async def _in_zone(self, prefix: str = '') -> str:
        """The name of PREFIX and the domain, as the DNS provider of its zone asks for it."""
        zone = self._domain
        while zone.count('.') > 1 and not await ask_dns(self._resolver, zone, TYPE_SOA):
            zone = zone.partition('.')[2]
        return f'{prefix}{self._domain}.'[:-len(zone) - 1].rstrip('.') or '@'

    async def missing(self) -> str:
        """What keeps the questions for _acme-challenge from us, and the cure."""
        found = await ask_dns(self._resolver, self._zone.name, TYPE_NS)
        why = ('you add a DNS record' if found == [] else 'you change the DNS record that leads '
               'elsewhere' if found else f'questions for {self._zone.name} get an answer: let them '
               'through to port 53 of this machine, by UDP and TCP, and check this DNS record')
        name = await self._in_zone('_acme-challenge.')
        return f'{why}: name {name}, type NS, value {self._domain}.'

    async def is_delegated(self) -> bool:
        """Return True if who asks for _acme-challenge is answered by this server."""
        trial = secrets.token_urlsafe(32)
        self._zone.texts.add(trial)
        try:
            for pause in TRIALS:
                await asyncio.sleep(pause)
                found = await ask_dns(self._resolver, self._zone.name, TYPE_TXT)
                if any(data[1:] == trial.encode() for data in found or ()):
                    return True
            return False
        finally:
            self.hide()

    async def reach(self) -> None:
        """Raises AcmeError unless who visits the domain over http arrives here; or Disconnected."""
        token, place = secrets.token_urlsafe(16), authority('http', self._domain, self._port)
        found = ([self._domain] if is_address(self._domain) else
                 await addresses_in_dns(self._resolver, self._domain))
        if not found:
            raise AcmeError(f'{self._domain} has no address; add a DNS record: '
                            + record_here(await self._in_zone()))
        self.show(token, token)
        try:
            for address in found:
                try:
                    _, said = await fetch(self._server.runtime,
                                          f'http://{place}{CHALLENGES}{token}', None, to=address)
                    why = '' if said == token.encode() else 'another server answers'
                except AcmeError as e:      # behind a router, only those outside may get through
                    inside = way_to(address)
                    why = '' if inside and ipaddress.ip_address(inside).is_private and (
                        not is_loopback(inside)) else explain(e.__cause__ or e, address)
                if why:
                    raise AcmeError(f'a request to http://{place} at {address} does not '
                                    f'arrive here ({why}); point the DNS record at this machine, '
                                    'and let port 80 through')
        finally:
            self.hide()

    async def check_caa(self, authority: Authority, names: Sequence[str], method: str) -> None:
        """Raises AcmeError where CAA records forbid what is to be asked (RFC 8659, RFC 8657)."""
        if is_address(self._domain):
            return
        for where, name, tag, values in await caa_terms(self._resolver, self._domain, names):
            if not any(allows(value, authority, method) for value in values):
                raise AcmeError(f'CAA records of {where} do not let {authority.url} issue for '
                                f'{name} ({tag} {", ".join(values)!r}); change them, or choose '
                                'another --acme-directory')


class Setback(NamedTuple):
    """Why there is no certificate for some names."""
    times: int = 0          # in a row
    why: str = ''
    again: float = 0.0      # not to be tried before, in Unix seconds


class Keeper:
    """Gets the best certificate that the records of the domain allow, and renews it.

    An address, and a domain without more records, is proved over http; where _acme-challenge is
    delegated to this server, by DNS, and then for all names.  Before an authority is asked, the
    server sees for itself that it will succeed.
    """

    def __init__(self, args: Args, server: Server, tls: AcmeTls, names: NameServer) -> None:
        self._args, self._server, self._tls, self._names = args, server, tls, names
        self._outside = Outside(args, server, names.zone)
        self._authorities = [
            Authority(server.runtime, url, tls.trust, args.state, self._outside.show)
            for url in args.acme_directory or [LETS_ENCRYPT]]
        self._all = [args.domain] + [f'*.{args.domain}'] * (not is_address(args.domain))
        self._setbacks: dict[str, Setback] = {}     # by the last of the names wanted
        self._failed: list[float] = []              # when proofs failed
        self._issuers: Any = None                   # as CAA records name who was asked, for doctor
        self._window, self._asked = 0.0, 0.0        # when to renew, as was said when we asked
        self._said: dict[str, str] = {}             # to the operator last, by what it is about
        self._path = os.path.join(args.state, 'acme.json')      # what survives a restart
        with contextlib.suppress(Exception), open_file(self._path) as f:     # else as at first
            kept, latest = json.load(f), time.time() + LONGEST_WAIT
            self._issuers = kept.get('issuers')
            self._failed = list(map(float, kept['failed']))
            self._setbacks = {
                name: Setback(max(0, int(times)), str(why), min(float(again), latest))
                for name, (times, why, again) in kept['setbacks'].items() if name in self._all}

    # What is to be done, and when.

    async def run(self) -> None:
        """Keep a certificate for as long as the server serves."""
        for name, setback in self._setbacks.items():
            if setback.again > time.time():
                self._complain(name, setback)
        while True:
            pause = max(await self._look(), LEAST_PAUSE)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._tls.look_now.wait(), pause)
                self._tls.look_now.clear()      # SIGHUP: somebody has mended something
                self._setbacks = {name: setback._replace(again=0.0)
                                  for name, setback in self._setbacks.items()}

    async def _look(self) -> float:
        """Do what is due; return for how many seconds nothing more is."""
        alone = self._all[:1]
        if alone != self._all:
            await self._answer_dns()
        delegated = alone != self._all and await self._outside.is_delegated()
        high = self._has(self._all)
        rungs = [self._all] * (delegated or high) + [alone] * (not high)        # from above
        for names in rungs:
            if await self._climb(names, delegated):
                break
        if self._has(alone):
            await self._tell(delegated)
        again = min([max(await self._due(names), self._setback(names).again) for names in rungs])
        done = self._has(self._all) and not self._setbacks
        return min(again - time.time(), LOOK if done else LOOK_SOON)

    def _has(self, names: Sequence[str]) -> bool:
        return set(names) <= set(self._tls.names)

    def _setback(self, names: Sequence[str]) -> Setback:
        return self._setbacks.get(names[-1], Setback())

    async def _answer_dns(self) -> None:
        """Answer DNS where we don't yet; say loudly where that can't be."""
        port, faults = self._args.dns_port, []
        hosts = self._args.dns_bind or outward_addresses()
        for host in hosts:
            try:
                await self._names.listen(host, port)
            except OSError as e:
                cure = ('run this server as root or with CAP_NET_BIND_SERVICE' if e.errno ==
                        errno.EACCES else 'stop what listens there, or name an address of this '
                        'machine with --dns-bind')
                faults.append(f'on port {port} of {host} ({plainly(e)}); {cure}')
        if not hosts:
            faults.append('before this machine has an address')
        self._say('dns', '; '.join(
            f"ERROR: DNS can't be answered {fault}; until then there is no https for names"
            for fault in faults))

    async def _climb(self, names: list[str], delegated: bool) -> bool:
        """Get a certificate for NAMES if one is due; return True if there is one."""
        if time.time() < await self._due(names):
            return True
        if time.time() < self._setback(names).again:
            return False
        try:
            await self._renew(names, delegated)
        except Exception as e:      # whatever an authority answers, the service goes on
            await self._fail(names, e)
            return False
        for name in names:
            self._setbacks.pop(name, None)
            self._said.pop(name, None)
        self._save()
        return True

    async def _due(self, names: Sequence[str]) -> float:
        """When a certificate for NAMES is to be had, in Unix seconds."""
        if not self._has(names):
            return 0.0
        begins, ends, _ = self._tls.validity
        if time.time() > self._asked + LOOK:
            self._asked = time.time()
            with contextlib.suppress(Exception):        # it says nothing, or is asked again
                self._window = random.uniform(
                    *await self._authorities[0].window(renewal_id(self._tls.path)))
        life = ends - begins
        if self._window:        # but never at once, and over and over; and never too late
            return min(max(self._window, begins + min(LOOK, life / 4)), ends - life / 4)
        return ends - life / (2 if life < SHORT_LIFE else 3)

    async def _renew(self, names: list[str], delegated: bool) -> None:
        """Get a certificate for NAMES, and show it.  Raises AcmeError, and what Authority does."""
        self._failed = [at for at in self._failed if 0 <= time.time() - at < FAILED_FOR]
        if len(self._failed) >= MOST_FAILED:
            raise AcmeError(f'{MOST_FAILED} proofs have failed within an hour',
                            wait=self._failed[0] + FAILED_FOR - time.time())
        method = 'dns-01' if len(names) > 1 else 'http-01'
        if method == 'http-01':
            await self._outside.reach()
        elif not delegated:
            raise AcmeError("https for names can't be renewed until "
                            + await self._outside.missing())
        try:
            pem = await asyncio.wait_for(self._ask(names, method), ORDER_PATIENCE)
        finally:
            self._outside.hide()
        fresh = self._tls.path + '.new'
        write_secret(fresh, pem)
        self._tls.load(fresh, fresh)       # raises where it is none, and the old one stays
        os.replace(fresh, self._tls.path)
        self._window = self._asked = 0.0
        if not self._has(names):
            raise AcmeError('the certificate that we got is not valid by the clock of this machine '
                            f'({time.strftime("%Y-%m-%d %H:%M", time.gmtime())} UTC); set it right')

    async def _ask(self, names: list[str], method: str) -> bytes:
        """Key and chain from the first authority, or the next where its rate is used up."""
        replaces = renewal_id(self._tls.path) if set(names) == set(self._tls.names) else ''
        for authority in self._authorities:
            self._server.log.note(
                f'certificate: asking {authority.url} for {" and ".join(names)}')
            try:
                await authority.enter(self._args.acme, self._args.acme_eab or '')
                self._issuers = list(map(str, authority.meta.get('caaIdentities') or ()))
                await self._outside.check_caa(authority, names, method)
                return await authority.obtain(names, method, self._profile(authority), replaces)
            except AcmeError as e:
                if e.code != 'rateLimited' or authority is self._authorities[-1]:
                    raise
                self._server.log.note(f'certificate: {printable(str(e))}')
        raise AssertionError('the last one returns or raises')

    def _profile(self, authority: Authority) -> str:
        """The kind of certificate to ask for.  Raises AcmeError."""
        wanted, offered = self._args.acme_profile, authority.meta.get('profiles') or {}
        if wanted and wanted not in offered:
            raise AcmeError(f'{authority.url} has no profile {wanted}; it offers: '
                            + (', '.join(offered) or 'none'))
        return wanted or ('shortlived' if len(self._all) == 1 and 'shortlived' in offered else '')

    # What went wrong, and what the operator reads.

    async def _fail(self, names: Sequence[str], error: Exception) -> None:
        """Note that ERROR kept us from a certificate for NAMES."""
        now, times, server = time.time(), self._setback(names).times + 1, self._server
        wait = max(BACKOFF[:times][-1], getattr(error, 'wait', 0.0))
        setback = self._setbacks[names[-1]] = Setback(times, words_for(error), now + wait)
        if getattr(error, 'code', '') == NOT_PROVED:
            self._failed.append(now)
        self._save()
        server.counters['certificate_failures'] += 1
        self._complain(names[-1], setback)
        if self._args.notify:
            await self._notify(self._args.notify, setback.why)

    def _save(self) -> None:
        with contextlib.suppress(OSError):      # without it, we only ask once more than we might
            write_secret(self._path, json.dumps(
                {'failed': self._failed, 'setbacks': self._setbacks,
                 'issuers': self._issuers}).encode())

    async def _notify(self, url: str, why: str) -> None:
        """Tell URL that there is no certificate, and WHY."""
        begins, ends, _ = self._tls.validity
        facts = {'event': 'certificate', 'domain': self._all[0], 'problem': printable(why),
                 'expires': ends, 'urgent': time.time() > ends - (ends - begins) / 4}
        try:
            response, _ = await fetch(
                self._server.runtime, url, client_tls() if url.startswith('https:') else None,
                json.dumps(facts), 'application/json')
            if response.status >= 300:
                raise AcmeError(f'{url} answers {response.status}')
        except AcmeError as e:
            self._server.log.note(f"warning: --notify can't be told: {e}")

    def _say(self, about: str, text: str, after: str = '') -> None:
        """Tell the operator TEXT, and what comes AFTER it; the same ABOUT one thing only once."""
        again = text == self._said.get(about)
        self._said[about] = text
        if text and (after or not again):
            self._server.log.note(('' if about == 'dns' else 'certificate: ') + printable(
                'the same again' if again else text)[:2 * MAX_TEXT] + after)

    def _complain(self, name: str, setback: Setback) -> None:
        minutes = max(1, round((setback.again - time.time()) / 60))
        self._say(name, setback.why, f'; trying again in {minutes} min, or at once on SIGHUP')

    async def _tell(self, delegated: bool) -> None:
        """Say how far up the ladder this server is, and what the next rung needs."""
        domain, (_, ends, names) = self._all[0], self._tls.validity
        until = time.strftime('until %Y-%m-%d', time.gmtime(ends))
        if len(self._all) == 1:
            text = f'https works for {domain} and its one tunnel {until}'
        elif self._all[1] in names:
            text = f'https works for {domain} and every name below it {until}'
        else:
            text = (f'https works for {domain} {until}, so sessions and tokens are safe; tunnels '
                    'have http' + ('' if delegated else ' until ' + await self._outside.missing()))
        self._say('works', text)


# What is typed.

def text_like(pattern: str, example: str) -> Callable[[str], str]:
    """A type for argparse: what PATTERN matches, as it does EXAMPLE."""
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f'expected something like {example}')
        return text
    return check


class Acme(Annex):
    """--acme."""
    title = 'https by itself'

    def server_options(self, add: Add) -> None:
        url = r'[!-~]+'
        add('--acme', type=text_like(r'[!-~]+@[!-~]+', 'you@example.com'), metavar='EMAIL',
            help='get and renew a certificate by itself')
        add('--acme-directory', action='append', metavar='URL',
            type=text_like(f'https://{url}', 'https://acme.example.com/directory'),
            help="the authority (Let's Encrypt); the second one is asked if its rate is used up")
        add('--acme-ca', metavar='FILE', help='also trust this authority for the directory')
        add('--acme-profile', metavar='NAME', help='kind of certificate, of those it offers')
        add('--acme-eab', metavar='KID:HMAC', help='account that you have at the authority',
            type=text_like('[^:]+:([A-Za-z0-9_-]{4})*([A-Za-z0-9_-]{2,3})?=*', 'KID:HMAC'))
        add('--resolver', type=place_of_resolver, metavar='ADDRESS[:PORT]',
            help="whom to ask what the world sees (the system's)")
        add('--dns-port', type=port_number, default=DNS_PORT, metavar='PORT',
            help='answer DNS here (%(default)s)')
        add('--dns-bind', action='append', metavar='ADDRESS',
            help='answer DNS at this address (those of this machine; repeatable)')
        add('--notify', type=text_like(f'https?://{url}', 'https://example.com/hook'),
            metavar='URL', help='POST what is wrong with the certificate to this URL')

    async def at_server(self, args: Args, server: Server) -> None:
        if not args.acme:
            for name in 'acme_directory', 'acme_ca', 'acme_profile', 'acme_eab', 'notify':
                if getattr(args, name):
                    raise UsageError(f'--{name.replace("_", "-")} needs --acme EMAIL; add it')
            return
        if is_loopback(args.domain) and not is_address(args.domain):
            raise UsageError('--acme needs --domain with a name or an address on the internet')
        if not (args.resolver or system_resolver() or is_address(args.domain)):
            raise UsageError('--acme needs --resolver ADDRESS here, since this system has no '
                             'resolv.conf that names one')
        trust = client_tls(args.acme_ca)
        sockets = args.listening.at(args.bind, args.tls_port)
        path = os.path.join(args.state, 'acme-certificate.pem')
        server.tls = tls = AcmeTls(path, sockets[0].getsockname()[1], trust)
        args.sources.all.append(tls)
        try:
            if os.path.exists(path):
                tls.load(path, path)
        except UsageError as e:
            server.log.note(f'warning: {e}; we get another one')
        for sock in sockets:
            TlsDoor(server, sock, tls.context)

    async def run(self, args: Args, server: Server) -> None:
        if not isinstance(server.tls, AcmeTls):
            return await super().run(args, server)
        names = NameServer(server.runtime, Zone(args.domain))
        try:
            await Keeper(args, server, server.tls, names).run()
        finally:
            names.close()


# ------------------------------------------------------------------------------------------------
# 40. Hand-over
#
# A restart: the successor gets the listening sockets, as systemd passes them, and says when it
# serves.
# ------------------------------------------------------------------------------------------------

READY_VARIABLE = 'LOCALTUNNEL_READY_FD'


def notify_systemd(log: Observer, text: str) -> None:
    """Send TEXT to systemd, if it asked to be told (Type=notify)."""
    path = os.environ.get('NOTIFY_SOCKET')
    if path:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.sendto(text.encode(), '\0' + path[1:] if path[0] == '@' else path)
        except OSError as e:
            log.note(f"warning: can't write to NOTIFY_SOCKET: {e.strerror}")


def say_ready(log: Observer) -> None:
    """Tell a predecessor, or systemd, that this server serves."""
    descriptor = os.environ.pop(READY_VARIABLE, '')
    if descriptor:
        os.write(int(descriptor), b'1')
        os.close(int(descriptor))
    else:
        notify_systemd(log, 'READY=1')


SETTLE = 5.0                    # before a hand-over: clients that are away try every 2 s at first
SUCCESSOR_TIMEOUT = 30.0        # for a successor to say that it is ready


async def start_successor(runtime: Runtime, sockets: Sockets, lock: int) -> int:
    """Start this program again with SOCKETS, and LOCK; its process id once it serves, else 0."""
    if not own_path():
        return 0        # it came through a pipe and can't be started again
    import fcntl
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    program = ['-m', __spec__.name] if __spec__ else [os.path.abspath(own_path())]
    locked, ready = FIRST_PASSED + len(sockets), FIRST_PASSED + len(sockets) + 1
    with ours:
        with theirs:
            passed = [*(sock.fileno() for sock in sockets), lock, theirs.fileno()]
            keep = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, ready + 1)       # above where they go,
                    for fd in passed]                       # so that none is overwritten
        try:
            child = os.posix_spawn(
                sys.executable, [sys.executable, *program, *sys.argv[1:]],
                {**os.environ, 'LISTEN_FDS': str(len(sockets)), LOCK_VARIABLE: str(locked),
                 READY_VARIABLE: str(ready)},
                file_actions=[(os.POSIX_SPAWN_DUP2, fd, FIRST_PASSED + i)
                              for i, fd in enumerate(keep)])
        except OSError:
            return 0
        finally:
            for fd in keep:
                os.close(fd)
        said = b''
        try:
            with contextlib.suppress(asyncio.TimeoutError):
                said = await asyncio.wait_for(runtime.loop.sock_recv(ours, 1), SUCCESSOR_TIMEOUT)
        finally:
            if not said:        # it ended, or takes too long, or this server is to end meanwhile
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    return child if said else 0


class HandOver(Annex):
    """SIGUSR2, and what systemd is told."""

    async def run(self, args: Args, server: Server) -> None:
        """Wait until a successor is asked for, and serves."""
        asked, log = asyncio.Event(), server.log
        if hasattr(signal, 'SIGUSR2'):
            server.runtime.loop.add_signal_handler(signal.SIGUSR2, asked.set)
        say_ready(log)          # only now: a signal without its handler would end this process
        while True:
            await asked.wait()
            asked.clear()
            if os.getpid() == 1:
                log.note("error: as process 1 this server can't hand over; restart the container")
                continue
            log.note('handing over to a successor')
            await look_until(lambda: all(member.session.connection
                                         for member in server.tunnels.members()), SETTLE)
            await server.refuse_clients(HANDING_OVER)
            child = await start_successor(server.runtime, args.listening.all(), args.lock)
            if child:
                log.note(f'process {child} serves from now on')
                return notify_systemd(log, f'MAINPID={child}\nREADY=1')
            server.tunnels.state = SERVING
            sign_lock(args.lock)
            log.note('error: the successor did not start; this server carries on')


# ------------------------------------------------------------------------------------------------
# 41. Operator's page
#
# What the operator of a server sees, and the kill switch.
#
# Metrics are reckoned when they are asked for.  Requests and bytes of users and tunnels are those
# that sessions count anyway, and the times of requests are noted with --admin alone.
# ------------------------------------------------------------------------------------------------

ADMIN_PORT = '9180'             # 9100 is that of Prometheus' node_exporter
BUSIEST = 10                    # users with metrics of their own: each label is a series for ever
# Of the histograms, in seconds: from a cached page to an answer that is given up.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

Sample = Tuple[str, float]      # what follows the name of a metric, and its value
# Name, kind, what it is, and its samples; or its only value, None for one that is not known.
Metric = Tuple[str, str, str, Union[Sequence[Sample], float, None]]


def labels(**values: str) -> str:
    """Return VALUES as Prometheus' labels."""
    escaped = {name: value.replace('\\', r'\\').replace('"', r'\"').replace('\n', r'\n')
               for name, value in values.items()}
    return '{' + ','.join(f'{name}="{value}"' for name, value in escaped.items()) + '}'


def metric(name: str, kind: str, text: str, samples: Sequence[Sample] | float | None) -> str:
    """Return a Metric in Prometheus' text format; '' for one that is not known."""
    if samples is None:
        return ''
    if isinstance(samples, (int, float)):
        samples = [('', samples)]
    return ''.join([f'# HELP {name} {text}\n# TYPE {name} {kind}\n',
                    *(f'{name}{rest} {value}\n' for rest, value in samples)])


class Histogram:
    """How many requests took how long.

    Sorting them together, now and then, takes a tenth of what it takes to count each at once.
    """

    def __init__(self) -> None:
        self._fresh: list[float] = []               # not yet counted
        self._counts = [0] * len(BOUNDS)            # that took no longer than each bound
        self._count, self._sum = 0, 0.0             # of all
        self.add = self._fresh.append               # one took this many seconds

    def count(self) -> None:
        """Count those that came since."""
        fresh = sorted(self._fresh)
        self._fresh.clear()
        self._counts = [n + bisect.bisect_right(fresh, bound)
                        for n, bound in zip(self._counts, BOUNDS)]
        self._count, self._sum = self._count + len(fresh), self._sum + sum(fresh)

    def samples(self) -> list[Sample]:
        """What Prometheus is told."""
        self.count()
        return [*((f'_bucket{{le="{bound}"}}', n)
                  for bound, n in zip((*BOUNDS, '+Inf'), (*self._counts, self._count))),
                ('_sum', round(self._sum, 6)), ('_count', self._count)]


def open_files() -> int | None:
    """Return how many descriptors this process has open; None where the system does not say."""
    for folder in ('/proc/self/fd', '/dev/fd'):
        with contextlib.suppress(OSError):
            return len(os.listdir(folder)) - 1      # one reads the folder
    return None


def resident_memory() -> int | None:
    """Return the bytes of memory that this process holds; None where the system does not say."""
    try:
        with open('/proc/self/statm', encoding='ascii') as f:
            return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    except (OSError, ValueError):
        return None


HEALTH = b'/.well-known/localtunnel/health'  # where balancers ask, by any Host
ASKS_WITHIN = 10.0              # where a balancer asks at all, it has asked within this time
TOLD = 3                        # times that it hears it: balancers don't believe it at once
MOVES_ON = 8.0                  # at most, until it has heard it so often
ARRIVES = 0.2                   # until what it sent here meanwhile is here


class Health:
    """What balancers are told of SERVER."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._asked_at, self._told = -NEVER, 0      # when one asked last; the times it was 503

    def page(self, address: str = '') -> tuple[str, Sequence[bytes]]:
        """The page that says whether the server takes new requests.  Raises HopFailed."""
        self._asked_at = self._server.runtime.now()
        if self._server.tunnels.state >= LEAVING:
            self._told += 1
            raise HopFailed(503, 'the server is shutting down')
        return 'text/plain', [b'ok\n']

    async def say_goodbye(self) -> None:
        """Wait until balancers, if any ask, have been told to send nobody here."""
        if self._server.runtime.now() - self._asked_at < ASKS_WITHIN:
            await look_until(lambda: self._told >= TOLD, MOVES_ON)
            await asyncio.sleep(ARRIVES)


Traffic = Dict[str, int]        # what sessions have carried


def traffic_of(session: Session) -> Traffic:
    """Requests until now, which are streams, and bytes from the client and to it."""
    return {'requests': session.last_id, 'received': session.decoder.received,
            'sent': session.outbox.sent}


class Accounts:
    """What the sessions of a server have carried, by tunnel and by user."""

    def __init__(self, tunnels: Tunnels) -> None:
        self.open: dict[Member, Tunnel] = {}        # those whose sessions are not over
        self.over: dict[Any, Traffic] = collections.defaultdict(collections.Counter)    # others
        tunnels.watchers.append(self._changed)
        tunnels.on_forget.append(lambda tunnel: self.over.pop(tunnel, None))

    def _changed(self, tunnel: Tunnel, member: Member) -> None:
        self.open[member] = tunnel
        if member.session.state == OVER:
            del self.open[member]
            for key in tunnel, member.grant.user:
                self.over[key].update(traffic_of(member.session))       # which a Counter adds

    def now(self) -> dict[Any, Traffic]:
        """What was carried until now, by Tunnel, and by the names of users."""
        found: dict[Any, Traffic] = collections.defaultdict(collections.Counter)
        for key, carried in self.over.items():
            found[key].update(carried)
        for member, tunnel in self.open.items():
            for key in tunnel, member.grant.user:
                found[key].update(traffic_of(member.session))
        return found


class Metrics(Observer):
    """What Prometheus is told."""

    def __init__(self, server: Server) -> None:
        self._server, self._started = server, time.time()
        self.accounts = Accounts(server.tunnels)
        self._first_byte, self._whole = Histogram(), Histogram()
        server.runtime.swept.add(self)

    def exchange(self, exchange: Record, seconds: float) -> None:
        if exchange.answered:
            self._first_byte.add(exchange.answered - exchange.began)
            if exchange.status != 101:
                self._whole.add(seconds)

    def sweep(self, now: float, woke_up: bool) -> None:
        """Count what came since, so that it does not pile up."""
        self._first_byte.count()
        self._whole.count()

    def text(self) -> str:
        """All of it."""
        return ''.join(itertools.starmap(metric, (
            *self._gauges(), *self._totals(), *self._users(), *self._times(), *self._process())))

    def _gauges(self) -> Iterable[Metric]:
        server, tunnels = self._server, self._server.tunnels
        members = tunnels.members()
        about = labels(version=__version__, python=sys.version.split()[0])
        trips = sorted(t for t in (member.session.liveness.round_trip for member in members)
                       if t != ROUND_TRIP)
        return [('localtunnel_' + name, 'gauge', text, value) for name, text, value in (
            ('build_info', 'What runs here.', [(about, 1)]),
            ('tunnels', 'Tunnels that are served.', sum(bool(t.members) for t in tunnels)),
            ('sessions', 'Clients that serve them.', len(members)),
            ('streams', 'Requests, upgrades and TCP connections that are under way.',
             sum(len(member.session.streams) for member in members)),
            ('visitors', 'Connections of visitors.', len(server.visitors)),
            ('held_requests', 'Requests that wait for a client, or for room at one.',
             sum(map(len, tunnels.waits.of.values()))),
            ('window_bytes', 'Memory that is promised to data in transit.',
             server.admission.budget.used),
            ('event_loop_lag_seconds', 'How late the event loop was when it looked last.',
             round(server.runtime.lag, 6)),
            ('round_trip_seconds', 'To a client and back, as measured last: the median.',
             round(trips[len(trips) // 2], 6) if trips else None),
            ('certificate_expires_seconds', 'When the certificate ends, in Unix time.',
             server.tls and server.tls.validity[1] or None))]

    def _totals(self) -> Iterable[Metric]:
        server = self._server
        counted = sorted({**server.counters, 'wrong_tokens': server.limits.wrong_tokens}.items(),
                         key=str)
        return [('localtunnel_requests_total', 'counter',
                 'Requests by the status of the answer; 0 if the visitor did not wait for it.',
                 [(labels(status=str(key)), n) for key, n in counted if isinstance(key, int)]),
                ('localtunnel_events_total', 'counter',
                 'Clients refused, by the reason; wrong tokens; failed TLS handshakes; files '
                 'read again, or in vain.',
                 [(labels(event=key), n) for key, n in counted if isinstance(key, str)])]

    def _users(self) -> Iterable[Metric]:
        """Traffic: of all, and of the busiest users."""
        users = {key: carried for key, carried in self.accounts.now().items()
                 if isinstance(key, str)}

        def busiest(most: Callable[[Traffic], int]) -> list[tuple[str, Traffic]]:
            return sorted(users.items(), key=lambda item: -most(item[1]))[:BUSIEST]
        return [('localtunnel_bytes_total', 'counter',
                 'Bytes that came from clients (in) and went to them (out).',
                 [(labels(direction='in'), sum(c['received'] for c in users.values())),
                  (labels(direction='out'), sum(c['sent'] for c in users.values()))]),
                ('localtunnel_user_requests_total', 'counter',
                 f'Requests, and TCP connections, that a user had; of the {BUSIEST} with most.',
                 [(labels(user=user or '-'), c['requests'])
                  for user, c in busiest(lambda c: c['requests'])]),
                ('localtunnel_user_bytes_total', 'counter',
                 f'Bytes from the clients of a user, and to them; of the {BUSIEST} with most.',
                 [(labels(user=user or '-', direction=direction), n)
                  for user, c in busiest(lambda c: c['received'] + c['sent'])
                  for direction, n in (('in', c['received']), ('out', c['sent']))])]

    def _times(self) -> Iterable[Metric]:
        """How long apps take, and all; only a client could tell the way to its app from the app."""
        return [('localtunnel_first_byte_seconds', 'histogram',
                 "From the end of a request's head until the app's answer begins: the app's "
                 'time, the round trip to its client, and any wait for a client.',
                 self._first_byte.samples()),
                ('localtunnel_request_duration_seconds', 'histogram',
                 "From the end of a request's head to the end of the app's answer, however "
                 'slowly the visitor reads it; without upgrades.', self._whole.samples())]

    def _process(self) -> Iterable[Metric]:
        """The metrics that every exporter has."""
        return [('process_' + name, kind, text, value) for name, kind, text, value in (
            ('start_time_seconds', 'gauge', 'When the process started, in Unix time.',
             round(self._started, 2)),
            ('cpu_seconds_total', 'counter', 'Processor time.', round(time.process_time(), 2)),
            ('resident_memory_bytes', 'gauge', 'Resident memory.', resident_memory()),
            ('open_fds', 'gauge', 'Open file descriptors.', open_files()),
            ('max_fds', 'gauge', 'Most open file descriptors.', descriptor_limit()))]


async def end_tunnels(server: Server, name: str, lease: bool, why: str) -> bool:
    """End what serves NAME, with LEASE free it too; return whether there was anything.

    Raises Refused.
    """
    admission, tunnels = server.admission, server.tunnels
    async with admission.turn:
        if lease and tunnels.state in (HANDING_OVER, ENDING):
            raise Refused(503, 'draining', 'this server ends; ask the next one')
        found = tunnels.end(name, why)
        for tunnel in tunnels if lease else ():
            if tunnel.name == name and tunnel.kind in admission.kinds:
                found |= await admission.kinds[tunnel.kind].free(tunnel)
        freed = lease and await admission.leases.save(admission.leases.free(name))
        if freed:
            audit(server.log, 'released', {**UNSERVED, 'name': name}, reason=why)
        return found | freed


class OperatorPage:
    """The operator's page (--admin): /healthz, /metrics, /tunnels."""

    def __init__(self, server: Server, metrics: Metrics, health: Health) -> None:
        self._server, self._metrics, self._health = server, metrics, health

    async def serve(self, connection: Connection) -> None:
        request = None
        try:
            head = await read_head(connection, HEAD_TIMEOUT)
            request = parse_hostless(head or b'')
            form, page = await self._page(request)
            answer = Own(200, form, [page], method=request.method)
        except (BadHttp, HopFailed, Refused) as e:
            answer = Failures().failed(
                HopFailed(e.status, str(e)), request.get(b'accept') if request else b'',
                request.method if request else b'GET')
        except (LocaltunnelError, OSError):
            return connection.close()       # the operator went away
        connection.transport.write(answer.whole('Connection: close'))
        await connection.linger()

    async def _page(self, request: Request) -> tuple[str, bytes]:
        """(content type, text) for REQUEST.  Raises HopFailed and Refused."""
        server, reads = self._server, request.method in (b'GET', b'HEAD')
        path, _, query = request.target.decode('latin-1').partition('?')
        host = request.host_name        # no stranger's DNS answers for a word, as containers have
        if path == '/healthz' and reads:        # balancers may ask without a host
            form, pieces = self._health.page()
            return form, b''.join(pieces)
        if not host or ('.' in host and not is_address(host)):
            raise HopFailed(403, 'open it by IP address, or by a name without a dot')
        if path == '/metrics' and reads:
            return 'text/plain; version=0.0.4; charset=utf-8', self._metrics.text().encode()
        if path == '/tunnels' and reads:
            return 'application/json', json.dumps(self.tunnels()).encode() + b'\n'
        if not path.startswith('/tunnels/') or request.method != b'DELETE':
            raise HopFailed(404, 'try /healthz, /metrics, /tunnels or DELETE /tunnels/NAME')
        if not await end_tunnels(server, path[len('/tunnels/'):].lower(), query == 'lease=1',
                                 'the operator of the server ended this tunnel'):
            raise HopFailed(404, 'there is no such tunnel')
        return 'text/plain', b'ended\n'

    def tunnels(self) -> list[dict[str, Any]]:
        """What is served, what was until some minutes ago, and for whom requests are kept."""
        tunnels = self._server.tunnels
        carried = self._metrics.accounts.now()
        kept = [Tunnel(key, 'http') for key, detour in tunnels.detours.items()
                if detour.waiting(key) and not tunnels.get(key)]
        return [self._tunnel(tunnel, carried[tunnel]) for tunnel in (*tunnels, *kept)]

    def _tunnel(self, tunnel: Tunnel, carried: Traffic) -> dict[str, Any]:
        members = tunnel.members
        lives = [member.session.liveness for member in members]
        seen = max([tunnel.left_at, *(liveness.heard for liveness in lives)])
        zero = time.time() - self._server.runtime.now()     # of the runtime's clock, in Unix time
        tunnels = self._server.tunnels
        detour, held = tunnels.detours.get(tunnel.key), tunnels.waits.of.get(tunnel.key, ())

        def when(moment: float) -> str | None:
            return rfc3339(zero + moment) if moment > -NEVER else None      # not since the start
        return {'name': tunnel.name, 'kind': tunnel.kind, 'url': tunnel.url, 'user': tunnel.user,
                'since': when(tunnel.since), 'last_seen': when(seen),
                'requests': carried['requests'], 'bytes_in': carried['received'],
                'bytes_out': carried['sent'], 'held': len(held),
                'kept': detour.waiting(tunnel.key) if detour else 0,
                'sessions': [
                    {'user': member.grant.user, 'client': member.session.facts['client'],
                     'version': member.session.facts['version'],
                     'connected': member.session.connection is not None,
                     'streams': len(member.session.streams),
                     'round_trip_ms': None if liveness.round_trip == ROUND_TRIP else
                     round(liveness.round_trip * 1e3, 1)}
                    for member, liveness in zip(members, lives)]}


class Operator(Annex):
    """--admin, and the page for balancers."""
    title = "the operator's page"

    def server_options(self, add: Add) -> None:
        add('--admin', type=host_and_port, nargs='?', const=ADMIN_PORT, metavar='[HOST:]PORT',
            help=f'serve /metrics, /tunnels and /healthz here (off; {ADMIN_PORT} if bare)')

    async def at_server(self, args: Args, server: Server) -> None:
        health = Health(server)
        server.pages.everywhere[HEALTH] = health.page
        server.doors.before_close.append(health.say_goodbye)
        if args.admin:
            metrics = Metrics(server)
            both: Any = Observers(server.log, metrics)
            server.log = both
            for sock in args.listening.at(*args.admin):
                page = OperatorPage(server, metrics, health)
                await server.doors.open(sock, page.serve, stays=True)


# ------------------------------------------------------------------------------------------------
# 42. Block list
#
# Whom an operator keeps out: names, users and addresses, in a file of the server's folder with one
# entry a line.  `block` changes it, and so may an editor.  Only a line that is taken out sets
# anyone free: a file that can't be read, or a mistake in it, does not.
# ------------------------------------------------------------------------------------------------

BLOCKED = 'blocked'             # the file
MAX_REASON = 200                # characters: with the contact it must fit into MAX_TEXT
BLOCKED_HEAD = ('# One entry a line: name:NAME, user:USER, an address or ADDRESS/BITS.  What\n'
                '# follows it after a # is the reason, which those who are blocked are told.\n')

# ('name', NAME), ('user', USER), or of addresses (version, bits that differ, those that don't).
Key = Union[Tuple[str, str], Tuple[int, int, int]]
Blocked = Tuple[Key, str, str]  # an entry: its key, how it is written, and the reason


def read_entry(text: str) -> tuple[Key, str]:
    """What TEXT names, and how that is written; a bare word is a name.  Raises ValueError."""
    with contextlib.suppress(ValueError):
        net = ipaddress.ip_network(text, strict=False)
        first, bits = plain_address(str(net.network_address)), net.max_prefixlen - net.prefixlen
        written = f'{first}/{first.max_prefixlen - bits}' if bits else str(first)
        return (first.version, bits, int(first) >> bits), written
    kind, colon, word = text.partition(':')
    if not colon:
        kind, word = 'name', text
    if kind == 'name' and NAME.fullmatch(word.lower()):
        return ('name', word.lower()), f'name:{word.lower()}'
    if kind == 'user' and re.fullmatch('[^\\s#]+', word):
        return ('user', word), text
    raise ValueError(f'{printable(text)!r} is not name:NAME, user:USER, an address or ADDRESS/BITS '
                     '(a name is what stands before the domain, such as demo)')


def read_line(line: bytes) -> Blocked | None:
    """What a LINE of the file says, None for nothing.  Raises ValueError."""
    text, _, reason = line.decode('utf-8-sig', 'replace').partition('#')
    if not text.strip():
        return None
    key, written = read_entry(text.strip())
    return key, written, printable(reason.strip())[:MAX_REASON]


def read_list(path: str, known: dict[bytes, Blocked | None]
              ) -> tuple[dict[bytes, Blocked | None], list[str]]:
    """What the lines of the file at PATH say, and what is wrong in it.  Raises OSError.

    Lines that are KNOWN are not read again: to read a hundred thousand networks takes a second.
    """
    lines, wrong = {}, []
    for number, line in enumerate(whole_lines(path), 1):
        try:
            lines[line] = known[line] if line in known else read_line(line)
        except ValueError as e:
            wrong.append(f'line {number}: {e}')
    return lines, wrong


class BlockList(Bars, Source):
    """Whom a server keeps out."""
    what = 'block list'

    def __init__(self, path: str, server: Server, contact: str) -> None:
        """Raises UsageError where the file is there and can't be read."""
        self._path, self._server, self._seen = path, server, stamp_of(path)
        self._contact = f'; ask about it at {contact}' if contact else ''
        self._lines: dict[bytes, Blocked | None] = {}   # as they were read last
        self._reasons: dict[Key, str] = {}      # of all who are blocked
        self._widths: set[tuple[int, int]] = set()      # the first two of the keys of addresses
        try:
            error = self._read()
        except OSError as e:
            raise UsageError(f"can't read the block list {path}: {e.strerror}") from e
        if error:
            server.log.note(f'error: {error}')
        server.admission.checks.append(self.check_client)

    def __len__(self) -> int:
        return len(self._reasons)

    def changed(self) -> bool:
        return stamp_of(self._path) != self._seen

    def reload(self) -> str | None:
        try:
            wrong = self._read()
        except OSError as e:
            return f"can't read the block list {self._path} ({e.strerror}); it stays as it was"
        self._end()
        return wrong

    def _read(self) -> str | None:
        """Read the file; return what is wrong in it, and then keep those who were blocked, too."""
        self._seen = stamp_of(self._path)
        lines, wrong = read_list(self._path, self._lines)
        reasons = {key: reason for key, _, reason in filter(None, lines.values())}
        self._lines, self._reasons = lines, {**self._reasons, **reasons} if wrong else reasons
        self._widths = {(key[0], key[1]) for key in self._reasons if len(key) == 3}
        self._server.tunnels.bars = self if self._reasons else None
        return (f'a mistake in the block list {self._path}, {wrong[0]}. The other lines hold, and '
                'all who were blocked stay so until it is mended') if wrong else None

    def _end(self) -> None:
        """End clients and visitors who are blocked and here."""
        tunnels = self._server.tunnels
        for tunnel in tunnels:
            for member in tuple(tunnel.members):
                client = member.session.facts['client']
                why = self._why(tunnel.name, member.grant.user, client)
                if why:
                    tunnels.revoke(tunnel, member, why)
                    # Reason and address are the client's to know, not its visitors'.
                    tunnel.ended = 'the operator of this server has ended this tunnel'
        for visitor in self._server.visitors:
            if not visitor.idle and self._has(visitor.address):
                visitor.connection.reset(CANCELLED, 'the operator has blocked this address')

    def _has(self, address: str) -> Key | None:
        """The key by which ADDRESS is blocked, None if it is not."""
        if not self._widths:
            return None
        try:
            ip = plain_address(address)
        except ValueError:
            return None
        keys = ((version, bits, int(ip) >> bits) for version, bits in self._widths
                if version == ip.version)
        return next((key for key in keys if key in self._reasons), None)

    def _why(self, name: str, user: str, address: str) -> str:
        """Why no client of USER at ADDRESS may serve NAME; '' if one may."""
        for what, key in ((f'the name {name}', ('name', name)),
                          (f'the user {user}', ('user', user)),
                          (f'the address {address}', self._has(address))):
            reason = self._reasons.get(key) if key else None
            if reason is not None:
                return (f'the operator of this server has blocked {what}'
                        + (f' ({reason})' if reason else '') + self._contact)
        return ''

    def check_client(self, asked: Candidate) -> None:
        """Raises Refused where ASKED may serve no tunnel."""
        why = self._why(asked.name, asked.grant.user, asked.visitor.address)
        if why:
            raise Refused(403, 'blocked', why, final=True)

    def check_visitor(self, name: str, address: str) -> None:
        if self._has(address):
            why = HopFailed(403, 'the operator of this server has blocked the address '
                            f'{address}{self._contact}')
        elif ('name', name) in self._reasons or ('user', self._user_of(name)) in self._reasons:
            why = HopFailed(410, 'the operator of this server has ended the tunnel '
                            f'{name}{self._contact}')
        else:
            return
        self._server.counters['blocked_visitors'] += 1
        raise why

    def _user_of(self, name: str) -> str:
        """The user whose NAME it is, or was when it was served last."""
        owner = self._server.admission.leases.owner(name, time.time()) or ''
        tunnel = self._server.tunnels.get(name)
        return owner[5:] if owner.startswith('user:') else tunnel.user if tunnel else ''


BLOCK_EPILOG = """ENTRY is one of
  demo, name:demo             a name: what stands before the server's domain
  user:ana                    a user of the token file, with all names of theirs
  203.0.113.7, 2001:db8::/32  addresses, of clients and of visitors

A running server knows within a second. It ends their clients, tells them the
reason, and lets nobody have the name; visitors of a name get 410, and visitors from
an address 403.

examples:
  localtunnel.py block demo --reason phishing
  localtunnel.py block 203.0.113.0/24 --state /var/lib/localtunnel
  localtunnel.py block --remove user:ana
  localtunnel.py block --list"""


class Blocking(Annex):
    """The command `block`, and the list at a server."""

    def commands(self, add: Callable[..., argparse.ArgumentParser]) -> None:
        parser = add('block', help='keep a name, a user or addresses out of your server',
                     usage='%(prog)s ENTRY [OPTION ...] | --list [OPTION ...]', epilog=BLOCK_EPILOG)
        parser.add_argument('entry', nargs='?', metavar='ENTRY', help='whom to block (see below)')
        parser.add_argument('--reason', metavar='TEXT', help='told to those who are blocked')
        parser.add_argument('--remove', action='store_true', help='block ENTRY no longer')
        parser.add_argument('--list', action='store_true', help='print who is blocked')
        parser.add_argument('--state', metavar='DIR', help="the server's folder")
        parser.set_defaults(run=self.block)

    @staticmethod
    def block(args: Args) -> int:
        """Change or print the list; return the exit code."""
        folder = state_folder(args.state)
        path = os.path.realpath(os.path.join(folder, BLOCKED))
        if bool(args.entry) == args.list or args.reason and (args.list or args.remove):
            raise UsageError('block takes an entry, with --reason TEXT or --remove, or --list')
        if not os.path.isdir(folder):
            raise UsageError(f"{folder} is not there; name your server's folder with --state")
        try:
            lines, wrong = read_list(path, {})
            if args.list:
                shown = [f'{text}  # {why}' if why else text
                         for _, text, why in filter(None, lines.values())]
                shown += [f'# {mistake}' for mistake in wrong]
                print_line('\n'.join(shown or ['# nobody is blocked']))
                return int(bool(wrong))
            key, text = read_entry(args.entry)
            gone = {line for line, entry in lines.items() if entry and entry[0] == key}
            if args.remove and not gone:
                raise LocaltunnelError(f'{text} is not in {path}; see block --list')
            reason = printable(' '.join((args.reason or '').split()))[:MAX_REASON]
            new = f'{"" if lines else BLOCKED_HEAD}{text}' + f'  # {reason}' * bool(reason) + '\n'
            rewrite(path, gone, b'' if args.remove else new.encode())
        except ValueError as e:
            raise UsageError(str(e)) from e
        except OSError as e:
            raise LocaltunnelError(f"can't use {path}: {e.strerror}") from e
        print_line(f'{text} is {"no longer blocked" if args.remove else "blocked"}, in {path}')
        if text.startswith('name:') and ':' not in args.entry and not args.remove:
            print_line(f'(a user of this name is not: for that, block user:{args.entry})')
        return 0

    async def at_server(self, args: Args, server: Server) -> None:
        args.sources.all.append(BlockList(os.path.join(args.state, BLOCKED), server,
                                          getattr(args, 'contact', None) or ''))


# ------------------------------------------------------------------------------------------------
# 43. Kept requests
#
# What comes for a client that is away, and may wait, waits on the server's disk: `server --keep`,
# `client --keep 'POST /hooks/*'`.  Its sender is told 2xx once it is on disk, and it leaves the
# disk once the app has answered it.
#
# Each is a file that is written once; its name tells all that is known of it: when it came, how
# often it was tried, for whom it is and whose that name was.  So at no moment is it there by half
# or twice, whatever process is killed:
#
#   ID.0.NAME.OWNER.*.new    ID.0.NAME.OWNER    ID.1.NAME.OWNER ...           gone
#   it is written            it is kept         its first try begins ...      it was answered
#
# Who changes the folder from outside (a command, a server that hands over) touches the file `look`,
# too; then the server that runs looks again, and tries all at once.
# ------------------------------------------------------------------------------------------------

KEPT = 'kept'                   # the folder
MAX_KEPT = 1 * MIB              # a body: most webhooks have some KiB
MOST_KEPT = 1000                # requests of a name
MOST_KEPT_BYTES = 64 * MIB      # and what these take on disk
DISK_BLOCK = 4 * KIB            # as much as a small file takes there
KEPT_FOR = 3 * DAY              # as long as most senders would try
TOLD_WITHIN = 1.0               # seconds for a client to show that it is there: Slack waits 3
JUST_HEARD = 0.1                # or to be so without: it may have frozen since it was heard
ANSWERED_WITHIN = 300.0         # by the app: someone may have stopped it at a breakpoint
LONGEST_PAUSE = 300.0           # between tries; the first takes a second, each later one twice that
TRIES_IN_FRONT = 10             # a quarter of an hour; then a request steps behind the others
LEFT_OVER = 60.0                # of this age, a file that is being written is one of a crash
MAX_PATTERNS = 20               # of a client: they stand in its lease
KEPT_STATUSES = 200, 202, 204
KEPT_STATUS = 202               # Accepted: it is not done yet
TRY_AGAIN = {0, 408, 425, 429, *range(500, 600)}        # 0: there was no answer
ONLY_ASK = b'GET', b'HEAD', b'OPTIONS', b'TRACE'
_KEEP = re.compile('([A-Z]{1,20}|[*]) (?=[/*])([!-)+->@-~]{0,200})([*]?)')
_KEPT_FILE = re.compile('[0-9a-f]{20}[.][0-9]{1,6}[.][a-z0-9-]{1,63}[.][0-9a-f]{64}')


class KeptRequest:
    """What the name of its FILE, and its size there, tell of a request on disk."""
    __slots__ = 'id', 'tries', 'name', 'owner', 'file', 'size', 'there'

    def __init__(self, file: str, size: int) -> None:
        self.id, tries, self.name, self.owner = file.split('.')     # a digest of its owner
        self.file, self.tries = file, int(tries)
        self.size = -(-size // DISK_BLOCK) * DISK_BLOCK
        self.there = True           # on disk; else it is being written

    @property
    def at(self) -> float:
        """When it came, in Unix seconds: its id begins with that."""
        return int(self.id[:14], 16) / 1e6


class Shelf:
    """The folder of kept requests.  All wait for the disk, and raise OSError."""

    def __init__(self, state: str) -> None:
        self.folder = os.path.join(state, KEPT)

    def path(self, file: str = 'look') -> str:
        """Where FILE is."""
        return os.path.join(self.folder, file)

    def settle(self) -> None:
        """Have the names in the folder on disk, and its own."""
        for folder in (self.folder, os.path.dirname(self.folder)) if os.name == 'posix' else ():
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def put(self, kept: KeptRequest, message: bytes) -> None:
        """Write MESSAGE so that no crash loses it; where that fails, nothing is left."""
        try:
            write_secret(self.path(kept.file), message)
            self.settle()
        except OSError:
            self.drop(kept)
            raise

    def read(self, kept: KeptRequest) -> bytes:
        """The request as it goes to the client."""
        with open_file(self.path(kept.file)) as f:
            return f.read()

    def begin_try(self, kept: KeptRequest) -> bytes:
        """Have the number of its tries on disk; return the request."""
        message, file = self.read(kept), f'{kept.id}.{kept.tries}.{kept.name}.{kept.owner}'
        os.rename(self.path(kept.file), self.path(file))
        kept.file = file
        self.settle()
        return message

    def drop(self, kept: KeptRequest) -> None:
        """Delete it."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(kept.file))

    def look(self) -> dict[str, KeptRequest]:
        """All that is there, by id and in order; what a crash left half written goes."""
        found = {}
        for entry in tuple(os.scandir(self.folder)):
            with contextlib.suppress(FileNotFoundError):        # another process was quicker
                state = entry.stat()
                if _KEPT_FILE.fullmatch(entry.name):
                    kept = KeptRequest(entry.name, state.st_size)
                    found[kept.id] = kept
                elif entry.name.endswith('.new') and time.time() - state.st_mtime > LEFT_OVER:
                    os.unlink(entry.path)
        return dict(sorted(found.items()))

    def touch(self) -> None:
        """Say that something has changed."""
        os.close(os.open(self.path(), os.O_WRONLY | os.O_CREAT, 0o600))
        os.utime(self.path())

    def touched(self) -> float:
        """When someone said so last."""
        return os.stat(self.path()).st_mtime


class Keep(NamedTuple):
    """What a client wants to be kept."""
    patterns: Sequence[tuple[bytes, bytes, bool]]   # method, path, and whether more may follow
    status: int                                     # which its senders are told
    gates: Sequence[Gate]                           # that let them pass

    def fits(self, request: Request) -> bool:
        """True if REQUEST is one of those, however the app reads its path."""
        path = request.target.partition(b'?')[0]
        return request.method not in ONLY_ASK and any(
            method in (b'*', request.method) and (path == begin or (
                more and path.startswith(begin) and not leads_out(path[len(begin):])))
            for method, begin, more in self.patterns)


def read_keep(said: Any, gates: Sequence[Gate] = ()) -> Keep:
    """What a client SAID in its hello, or in its lease.  Raises ValueError and TypeError."""
    patterns, status = map(dict(said).get, ('patterns', 'status'))
    found = []
    if not (isinstance(patterns, list) and 0 < len(patterns) <= MAX_PATTERNS
            and type(status) is int and status in KEPT_STATUSES):
        raise ValueError(f'up to {MAX_PATTERNS} patterns, and a status of 200, 202 or 204')
    for text in patterns:
        match = _KEEP.fullmatch(text)
        if not match or match.group(1).encode() in ONLY_ASK:
            raise ValueError(f"{printable(text)!r:.100} is not a method and a path, such as 'POST "
                             "/hooks/*'; a * is any method, or any end, and GET never waits")
        method, path, more = match.groups()
        found.append((method.encode(), path.encode(), bool(more)))
    return Keep(found, status, gates)


class Queues(Detour):
    """The requests that a server keeps, in a queue for each name."""

    def __init__(self, server: Server, shelf: Shelf, most: int) -> None:
        """MOST bytes in all."""
        self._server, self._shelf, self._most = server, shelf, most
        self._leases = server.admission.leases
        self._wanted: dict[str, Keep] = {}          # by name, of those who want any kept
        self._queues: dict[str, dict[str, KeptRequest]] = collections.defaultdict(dict)
        self._used = 0              # bytes in all
        self._last = 0              # the time of the last one, in microseconds: each has its own
        self._not_before: dict[str, float] = {}     # when the next try is due, by name
        self._tries: dict[str, asyncio.Task[None]] = {}     # under way, by name
        self._closed = False        # another server delivers from now on
        self._disk = Disk()

    # What is wanted stands in leases, and how many requests have expired.

    @staticmethod
    def offer(said: Any) -> str:
        """What is noted of what a client SAID."""
        read_keep(said)
        return json.dumps({word: said[word] for word in ('patterns', 'status')})

    async def learn(self, changes: Mapping[str, Lease | None]) -> None:
        """Know what the owners of names want; what came for an owner of before goes."""
        for name, lease in changes.items():
            facts, owner = (lease.facts, digest_of(lease.owner)) if lease else ({}, '')
            for kept in tuple(self._queues.get(name, {}).values()):
                if kept.owner != owner:
                    self._drop(kept)
            self._server.tunnels.detours.pop(name, None)
            with contextlib.suppress(KeyError, ValueError, TypeError, Refused):     # or nothing
                rules = json.loads(facts.get('access', '{}'))
                self._wanted[name] = read_keep(json.loads(facts['keep']),
                                               self._server.limits.gates_of(rules))
                self._server.tunnels.detours[name] = self

    def _owner(self, key: str) -> str:
        """The digest of who owns KEY now; '' for nobody."""
        owner = self._leases.owner(key, time.time())
        return digest_of(owner) if owner else ''

    def _expired(self, key: str) -> int:
        """How many of KEY have, without its client's knowledge."""
        lease = self._leases.by_name.get(key)
        return int(lease.facts.get('expired', 0)) if lease else 0

    async def _note(self, key: str, more: int) -> None:
        """Note that MORE have; or with 0, that the client knows of all."""
        with contextlib.suppress(Refused):      # the disk is full
            async with self._server.admission.turn:
                await self._leases.save(self._leases.note(
                    key, expired=str(self._expired(key) + more) if more else ''))

    def waiting(self, key: str) -> int:
        return len(self._queues[key])

    def welcome(self, key: str) -> dict[str, Any]:
        self._not_before.pop(key, None)
        self._server.runtime.spawn(self._note(key, 0))
        return {'kept': self.waiting(key), 'expired': self._expired(key)}

    # A request comes.

    async def take(self, visitor: Visitor, exchange: Exchange, key: str) -> None:
        server, request, tries = self._server, exchange.request, 0
        budget, length = server.admission.budget, request.length
        wanted, owner = self._wanted[key], self._owner(key)
        lines = server.onward.of_request(visitor, request, key)
        for gate in wanted.gates:
            lines = gate(key, visitor, lines)
        if (not owner or not wanted.fits(request) or request.upgrade or request.has(b'expect')
                or length > MAX_KEPT):
            return await server.forward(visitor, exchange, key)
        if await self._is_there(key, alone=True):
            try:
                return await server.forward(visitor, exchange, key)
            except HopFailed as e:
                if e.hop != 'client' or exchange.body.whole is None:
                    raise
                tries = 1           # the client went meanwhile: the app may have it, or not
        held = 0 if exchange.body.finished else length if length >= 0 else MAX_KEPT
        if held and not budget.take(held, leave=budget.used):
            raise HopFailed(503, 'the server has no memory left for this request', 'Retry-After: 1')
        try:
            message = await self._message(exchange, lines)
            self._last = max(self._last + 1, time.time_ns() // 1000)
            kept = KeptRequest(f'{self._last:014x}{secrets.token_hex(3)}.{tries}.{key}.{owner}',
                               len(message))
            await self._keep(kept, message)
        finally:
            budget.give(held)
        await server.give(visitor, exchange, Own(
            wanted.status, 'text/plain', (), [f'Localtunnel-Kept: {kept.id}']))

    async def _is_there(self, key: str, alone: bool) -> bool:
        """True once a client has shown that it is there; ALONE: and nothing older waits for it."""
        tunnel, began = self._server.tunnels.get(key), self._server.runtime.now()

        def ready() -> bool:
            member = tunnel.pick() if tunnel else None
            return (member is not None and not (alone and self._queues[key])
                    and member.session.liveness.heard > began - JUST_HEARD)
        there = [member.session for member in tunnel.members if member.session.usable
                 and began - member.session.liveness.asked_at < TOLD_WITHIN] if tunnel else []
        if ready() or not there or alone and self._not_before.get(key, 0) > began + TOLD_WITHIN:
            return ready()
        for session in there:
            session.ping()
        return await look_until(ready, TOLD_WITHIN - LOOK_AGAIN)

    @staticmethod
    async def _message(exchange: Exchange, lines: bytes) -> bytes:
        """The request, once it is all here, with header LINES as it goes to a client."""
        body = exchange.body.whole
        if body is None:
            try:
                body = await asyncio.wait_for(read_whole(exchange.body, MAX_KEPT), UPLOAD_IDLE)
            except asyncio.TimeoutError as e:
                raise BadHttp(408, 'the body of the request did not arrive in time') from e
        if len(body) > MAX_KEPT:
            raise HopFailed(503, 'the client is away, and the request is too large to be kept',
                            hop='client')
        exchange.near.check()       # who went away will send it again
        if isinstance(exchange.body, ChunkedBody):
            lines += b'Content-Length: %d\r\n' % len(body)
        return encode_request(exchange.request, lines) + body

    async def _keep(self, kept: KeptRequest, message: bytes) -> None:
        """Have KEPT, which is MESSAGE, on disk.  Raises HopFailed, and then it is not there."""
        key, again = kept.name, f'Retry-After: {RETRY_AFTER}'
        queue, log = self._queues[key], self._server.log
        if self._used + kept.size > self._most:
            raise HopFailed(507, 'the server has no room left for requests that wait',
                            cure='its operator can give it more, with --keep')
        if len(queue) >= MOST_KEPT or kept.size + sum(
                other.size for other in queue.values()) > MOST_KEPT_BYTES:
            raise HopFailed(503, f'as many requests wait for {key} as may', again,
                            cure='start the client')
        self._add(kept)
        kept.there = False
        try:
            await self._disk.do(self._shelf.put, kept, message)
            kept.there = True
        except OSError as e:
            self._drop(kept)
            log.note(f"error: can't keep a request to {key}: {plainly(e)}")
            raise HopFailed(507 if e.errno in (errno.ENOSPC, errno.EDQUOT) else 503,
                            "the server can't write this request to its disk", again) from e
        if kept.id not in queue or kept.owner != self._owner(key):
            self._drop(kept)        # the name has changed hands meanwhile
            raise self._server.tunnels.away(key)
        if self._closed:
            with contextlib.suppress(OSError):
                await self._disk.do(self._shelf.touch)
        log.note('request kept', event='kept', name=key, id=kept.id)

    def _add(self, kept: KeptRequest) -> None:
        self._queues[kept.name][kept.id] = kept
        self._used += kept.size

    def _leave(self, kept: KeptRequest) -> None:
        if self._queues[kept.name].pop(kept.id, None):
            self._used -= kept.size

    def _drop(self, kept: KeptRequest) -> None:
        """Be done with KEPT; the disk is, once what was begun before is done there."""
        self._leave(kept)
        self._disk.later(self._shelf.drop, kept)     # what it can't delete comes back

    # A request goes.

    async def look(self) -> None:
        """See what is on the shelf, which others may have changed; what is too old goes."""
        known = {id: kept for queue in self._queues.values() for id, kept in queue.items()}
        found = await self._disk.do(self._shelf.look)
        for id, kept in known.items():
            new = found.pop(id, None)
            if new is None and kept.there:
                self._leave(kept)
            elif new and new.tries > kept.tries:        # another server has tried it
                kept.file, kept.tries = new.file, new.tries
        for id, kept in found.items():
            self._add(kept)
            self._last = max(self._last, int(id[:14], 16))      # whatever the clock says
        for key, queue in self._queues.items():
            old = [kept for kept in queue.values() if time.time() - kept.at > KEPT_FOR]
            for kept in old:
                self._drop(kept)
            if old:
                self._server.runtime.spawn(self._note(key, len(old)))

    async def run(self) -> None:
        """Have what is due tried, and look at the shelf when others say so, and now and then."""
        now, touched, look_at = self._server.runtime.now, 0.0, 0.0
        try:
            while True:
                with contextlib.suppress(OSError):
                    changed = await self._disk.do(self._shelf.touched)
                    if changed != touched:
                        self._not_before.clear()
                    if changed != touched or now() > look_at:
                        touched, look_at = changed, now() + LEFT_OVER
                        await self.look()
                for key, queue in self._queues.items():
                    tunnel = self._server.tunnels.get(key) if queue else None
                    if (tunnel and tunnel.pick() and key not in self._tries
                            and now() >= self._not_before.get(key, 0)):
                        self._tries[key] = self._server.runtime.spawn(self._deliver(key))
                await asyncio.sleep(SWEEP)
        finally:
            self._closed, deadline = True, now() + LINGER
            # What is tried has a moment to be answered, and what was answered to leave the disk.
            while (self._tries or self._disk.busy) and now() < deadline:
                with contextlib.suppress(asyncio.CancelledError):   # again and again, see end_task
                    await asyncio.sleep(LOOK_AGAIN)
            for task in self._tries.values():
                task.cancel()

    async def _deliver(self, key: str) -> None:
        """Deliver what waits for KEY, one after the other, until one has to wait on."""
        queue = self._queues[key]
        try:
            while queue and not self._closed and await self._is_there(key, alone=False):
                kept = min(queue.values(), key=lambda kept: (kept.tries // TRIES_IN_FRONT, kept.id))
                owner = self._owner(key)
                if not kept.there or not owner:
                    break
                status = await self._try(kept) if kept.owner == owner else None
                if status in TRY_AGAIN:
                    pause = min(LONGEST_PAUSE, 2.0 ** max(0, min(kept.tries - 1, 20)))
                    self._not_before[key] = self._server.runtime.now() + pause
                    break
                self._drop(kept)
        finally:
            del self._tries[key]

    async def _try(self, kept: KeptRequest) -> int | None:
        """The status of the app's answer to KEPT; 0 without one, None where KEPT is gone."""
        server, status, stream = self._server, 0, None
        kept.tries += 1
        mark = f'Localtunnel-Kept: {kept.id}; at={rfc3339(kept.at)}; try={kept.tries}'.encode()
        try:
            message = await self._disk.do(self._shelf.begin_try, kept)
            if kept.id not in self._queues[kept.name]:      # the name has changed hands
                return None
            tunnel = server.tunnels.get(kept.name)
            member = tunnel.pick() if tunnel else None
            stream = member.session.open_stream() if member else None
            if stream:
                head, _, body = message.partition(b'\r\n\r\n')
                status = (await asyncio.wait_for(ask_stream(stream, [
                    b'%b\r\n%b\r\n\r\n%b' % (head, mark, body)]), ANSWERED_WITHIN)).status
        except FileNotFoundError:       # taken out by hand
            return None
        except (LocaltunnelError, asyncio.TimeoutError):
            pass
        except OSError as e:
            server.log.note(f"error: can't deliver a kept request: {plainly(e)}")
        finally:
            if stream:
                stream.close()
        server.log.note('kept request ' + ('waits on' if status in TRY_AGAIN else 'answered'),
                        event='delivered', name=kept.name, id=kept.id, status=status,
                        tries=kept.tries)
        return status


class Keeps(ClientObserver):
    """Tells the user of a client what has waited for it."""

    def __init__(self, observer: ClientObserver) -> None:
        self._observer = observer
        self._first = True          # nothing was told yet

    def welcome(self, said: dict[str, Any]) -> None:
        kept, expired = said.get('kept'), said.get('expired')
        if type(kept) is int and type(expired) is int:
            words = [f'{n} webhook{"s" * (n != 1)} {what}' for n, what in (
                (kept, 'waited for you'), (expired, 'expired')) if n > 0]
            if words or self._first:
                self._observer.also('kept', '; '.join(words) or 'nothing while you were away')
        elif self._first:
            self._observer.hint('this server keeps no requests, so --keep has no effect; its '
                                'operator can start it with --keep MIB')
        self._first = False


KEPT_EPILOG = """examples:
  localtunnel.py kept                        what waits, the oldest first
  localtunnel.py kept 06613502939f0f99f467   all of one request
  localtunnel.py kept --now                  have all tried at once, not when they are due
  localtunnel.py kept --drop demo            forget what waits for demo"""


def show_kept(kept: KeptRequest, message: bytes, whole: bool) -> None:
    """Print KEPT, which is MESSAGE; unless the WHOLE is asked for, without what may be secret."""
    head, *rest = message.decode(errors='replace').split('\n')
    if not whole:
        head, rest = head.rpartition(' ')[0].partition('?')[0], []
    for line in (f'{kept.id}  {rfc3339(kept.at)}  tries={kept.tries}  {kept.name}  {head}', *rest):
        print_line(printable(line.rstrip('\r')))


class Keeping(Annex):
    """--keep at both ends, and the command `kept`."""
    title = 'while the client is away'
    _queues: Queues | None = None       # of the server in this process

    def client_options(self, add: Add) -> None:
        add('--keep', action='append', default=[], metavar="'METHOD PATH'",
            help="requests that may wait while you are away, such as 'POST /hooks/*' (repeatable)")
        add('--keep-status', type=int, choices=KEPT_STATUSES, default=KEPT_STATUS,
            help='what their senders are told (%(default)s)')

    def server_options(self, add: Add) -> None:
        add('--keep', type=count, default=0, metavar='MIB',
            help='keep requests for clients that are away, this much in all (none)')

    def commands(self, add: Callable[..., argparse.ArgumentParser]) -> None:
        parser = add('kept', help='show what your server keeps for clients that are away',
                     usage='%(prog)s [ID | --now | --drop ID|NAME|all] [--state DIR]',
                     epilog=KEPT_EPILOG)
        one = parser.add_mutually_exclusive_group()
        one.add_argument('id', nargs='?', metavar='ID', help='show all of this request')
        one.add_argument('--now', action='store_true', help='have all tried at once')
        one.add_argument('--drop', metavar='ID|NAME|all', help='delete these')
        parser.add_argument('--state', metavar='DIR', help="the server's folder")
        parser.set_defaults(run=self.kept)

    @staticmethod
    def kept(args: Args) -> int:
        """Show or change what waits; return the exit code."""
        shelf, which = Shelf(state_folder(args.state)), args.id or args.drop
        try:
            found = [kept for kept in shelf.look().values()
                     if which in (None, 'all', kept.id, kept.name)]
            if which and not found:
                raise LocaltunnelError(f'nothing that waits is called {printable(which)}; see kept')
            for kept in found:
                if args.drop:
                    shelf.drop(kept)
                elif not args.now:
                    with contextlib.suppress(FileNotFoundError):        # it was just delivered
                        show_kept(kept, shelf.read(kept), whole=bool(args.id))
            if not found:
                print('localtunnel.py: nothing waits', file=sys.stderr)
            elif args.drop or args.now:
                shelf.touch()
                print_line(f'deleted: {len(found)}' if args.drop else f'{len(found)} will be tried '
                           'within a second, if the server runs and their clients are there')
        except OSError as e:
            raise LocaltunnelError(f"can't use {e.filename or shelf.folder}: {e.strerror}; for a "
                                   'server that was started with sudo, type sudo here, too') from e
        return 0

    def at_client(self, args: Args, app: App, address: ServerAddress) -> None:
        if not args.keep:
            if args.keep_status != KEPT_STATUS:
                raise UsageError("--keep-status is for what is kept; add --keep 'METHOD PATH'")
            return
        said = {'patterns': args.keep, 'status': args.keep_status, 'optional': True}
        try:
            read_keep(said)
        except ValueError as e:
            raise UsageError(f'--keep: {e}') from e
        if app.target.kind != 'http':
            raise UsageError('--keep is for http; what comes by --tcp is never kept')
        address.wants['keep'] = said
        observers: Any = Observers(app.observer, Keeps(app.observer))
        app.observer = observers

    async def at_server(self, args: Args, server: Server) -> None:
        shelf, leases = Shelf(args.state), server.admission.leases
        with using(args.state):
            if args.keep:
                os.makedirs(shelf.folder, mode=0o700, exist_ok=True)
                shelf.settle()
                shelf.touch()
                self._queues = Queues(server, shelf, args.keep * MIB)
                await self._queues.look()
                leases.check_fact('expired', int, server.log.note)
                await self._queues.learn(leases.by_name)
                leases.keepers.append(self._queues.learn)
                server.limits.offers['keep'] = self._queues.offer
            elif os.path.isdir(shelf.folder) and shelf.look():
                server.log.note(f'warning: requests wait in {shelf.folder}; to deliver them, start '
                                'this server with --keep MIB')

    async def run(self, args: Args, server: Server) -> None:
        await (self._queues.run() if self._queues else super().run(args, server))


# ------------------------------------------------------------------------------------------------
# 44. Mail
#
# Mail to anything@NAME.DOMAIN becomes a POST to the app: SMTP on one side (RFC 5321), on the other
# a form with the fields of Mailgun's routes, or the message as it is.
#
# The sender has its answer after the app has given its own: what the app took is delivered, and all
# else is still the sender's, who tries again for days, or tells the author.  So no mail is kept
# here; what is under way lies in temporary files without names.  One answer is for all recipients
# of a message, so they are of one name: for others its sender comes again.
#
#   app              sender          then
#   2xx              250             it is delivered
#   4xx              550             it goes back to its author; but 408, 425 and 429 are as 5xx
#   else, or away    451             the sender tries again
# ------------------------------------------------------------------------------------------------

MAIL_PORT = 25
MAX_MAIL = 25 * MIB             # of a message: Gmail and others take no more either
MAX_MAIL_LINE = 4 * KIB         # of a command, and of a message: RFC 5321 allows 1,000 bytes
MAX_RECIPIENTS = 100            # which RFC 5321 4.5.3.1.8 asks for
MAX_COMMANDS, MAX_WRONG_COMMANDS = 1000, 20         # between two messages
MAX_SENDERS, MAX_SENDERS_OF_ADDRESS = 1000, 20      # connections; Postfix makes up to 20 to a place
SENDER_IDLE = 300.0             # seconds for a command, or a reply to be read (RFC 5321 4.5.3.2)
SENDER_HURRY = 10.0             # the same while more than half of the connections are taken
MAIL_PACE = 14 * KIB            # bytes of a message that give it another second: 25 MiB in 35 min
APP_WITHIN = 300.0              # for the app to answer: senders wait for 600
POSTED_TOGETHER = 20            # to one name: development servers hold 5 connections in line
MAIL_PIECE = 64 * KIB           # of a file in memory, and to the app at a time
MAIL_TURN = 1000                # lines read in a turn of the loop, a millisecond
MAIL_HELD = 5 * MAIL_PIECE      # of memory: both files, what is unread, and what is not written
MAIL_ON_DISK = 1 * GIB          # of all messages under way; their forms may take twice as much
TO_POSTMASTER = 4 * KIB         # of a message to postmaster@DOMAIN, in the log
# A message beyond these is not decoded: there are some that would take hours, or all memory.
DECODED_WITHIN, DECODED_TOGETHER = 5.0, 2           # seconds; each takes six times its size
MAX_PARTS, MAX_PART_FIELDS, MAX_MAIL_LINES = 1000, 10000, 500000
MAX_PART_FIELD, FED = 32 * KIB, 16 * KIB            # bytes of a field, and to the parser at a time

MAIL_PATH = re.compile(r'/[!-"$-~]{0,2000}')
HELO = re.compile(r'[\w.:\[\]-]{1,255}', re.ASCII)
# A mailbox, perhaps behind a route that is not taken (RFC 5321 4.1.1.3), and parameters.
_UNSAFE = r'\x00-\x1f\x7f-\x9f\ud800-\udfff'
ENVELOPE = re.compile(
    rf'(?i)(?:FROM|TO): ?<(?:@[\w.,:@-]+:)?((?:[^\s{_UNSAFE}<>()\[\]\\,;:@"]{{1,64}}'
    rf'|"(?:[^{_UNSAFE}"\\]|\\[ -~]){{0,62}}")@[\w.-]{{1,253}}|postmaster|)>((?: [!-~]+)*)')
MAIL_PARAMETER = re.compile('SIZE=[0-9]{1,20}|BODY=(7BIT|8BITMIME)|SMTPUTF8')
BOUNDARY_IN_CHARSET = re.compile(r'(?i)boundary\*(\d+\*)?\s*=')
# Where an answer quotes what it answers, or a signature begins.
QUOTES = re.compile(r'(?m)^(?:-- ?$|On .*(?:\n.*)? wrote:$|_{20,}$'
                    r'|-{3,} ?(?:Original|Forwarded) [Mm]essage ?-)')

TOO_LARGE = f'552 5.3.4 a message may have {MAX_MAIL} bytes'
TOO_MUCH = '452 4.3.1 there is too much mail at once; try again later'
REPLIES = {                     # to commands that do nothing else
    'NOOP': '250 2.0.0 OK', 'RSET': '250 2.0.0 OK', 'VRFY': '252 2.5.2 send mail, and see',
    'EXPN': '502 5.5.1 there are no lists here', 'HELP': '214 2.0.0 as RFC 5321 has it',
    'QUIT': '221 2.0.0 goodbye'}


def decoded(data: bytes, charset: str = '') -> str:
    """DATA as text, whatever CHARSET it claims to be in.

    Python knows others than those that have aliases; some take hours, and a wrong name it keeps.
    """
    from encodings import aliases
    name = re.sub('[^a-z0-9]+', '_', charset.lower())
    with contextlib.suppress(LookupError):      # rot13 is not for text
        if name in {*aliases.aliases, *aliases.aliases.values(), 'koi8_u', 'cp874'}:
            return data.decode(name, 'replace')
    return data.decode(errors='replace')


def header_text(value: Any) -> str:
    """The VALUE of a header field or parameter as text, with what RFC 2047 and 2231 encode."""
    from email import errors, header
    if isinstance(value, tuple):
        return decoded(value[2].encode('raw-unicode-escape'), value[0] or '')
    value = decoded(value.encode(errors='surrogateescape'))
    with contextlib.suppress(errors.MessageError, ValueError):
        value = ''.join(piece if isinstance(piece, str) else decoded(piece, charset) if charset else
                        piece.decode('raw-unicode-escape', 'replace')
                        for piece, charset in header.decode_header(value))
    return re.sub('[\r\n]+', '', value)


def parse_mail(raw: BinaryIO, bound: Callable[[bool], None]) -> Any:
    """RAW as an email.message.Message.  BOUND is told now and then whether it makes sense."""
    from email import message, parser, policy
    fields, parts, lines = itertools.count(), itertools.count(), 0

    class Careful(policy.Compat32):
        """Raises for nothing that is malformed, but for what takes too much."""

        def header_source_parse(self, sourcelines: list[str]) -> tuple[str, str]:
            text = ''.join(sourcelines)     # Python keeps each unknown charset of a boundary
            bound(next(fields) < MAX_PART_FIELDS and len(text) < MAX_PART_FIELD
                  and not BOUNDARY_IN_CHARSET.search(text))
            return super().header_source_parse(sourcelines)

    def part(policy: Any = None) -> Any:
        bound(next(parts) <= MAX_PARTS)
        return message.Message(policy)
    feed = parser.BytesFeedParser(part, policy=Careful(
        max_line_length=0, mangle_from_=False, linesep='\r\n'))
    for piece in iter(lambda: raw.read(FED), b''):
        lines += piece.count(b'\n')
        bound(lines <= MAX_MAIL_LINES)
        feed.feed(piece)
    return feed.close()


def without_quotes(text: str) -> str:
    """What is new in TEXT, an answer."""
    new = QUOTES.split('\n'.join(text.splitlines()), maxsplit=1)[0].split('\n')
    return '\r\n'.join(line for line in new if not line.startswith('>')).strip()


def read_mail(raw: BinaryIO) -> Iterator[tuple[str, bytes, str, str]]:
    """(name, value, file name, type) of the fields of a form for the message in RAW.

    Raises anything for what was made to break it.
    """
    deadline = time.monotonic() + DECODED_WITHIN

    def bound(passes: bool) -> None:
        if not passes or time.monotonic() > deadline:
            raise ValueError('no message that makes sense')
    message, headers, texts, count = parse_mail(raw, bound), [], {}, 0
    for name, value in message.raw_items():
        bound(True)
        headers.append((name, header_text(value)))
    parts = [message]
    while parts:
        bound(True)
        part = parts.pop()
        kind, inside = part.get_content_type(), part.get_payload()
        file = header_text(part.get_param('filename', '', 'content-disposition')
                           or part.get_param('name', ''))
        if isinstance(inside, list) and kind.startswith('multipart/'):
            parts += reversed(inside)
            continue
        data = (b''.join(one.as_bytes() for one in inside) if isinstance(inside, list) else
                part.get_payload(decode=True) or b'')       # a message inside is a file, too
        if kind in ('text/plain', 'text/html') and kind not in texts and not file and (
                part.get_content_disposition() != 'attachment'):
            texts[kind] = decoded(data, header_text(part.get_param('charset', '')))
        else:
            count += 1
            yield (f'attachment-{count}', data, re.split(r'[\\/]', file)[-1]
                   or f'attachment-{count}', kind)
    plain, first = texts.get('text/plain', ''), {
        name.lower(): value for name, value in reversed(headers)}
    for name, value in {
            'from': first.get('from', ''), 'subject': first.get('subject', ''),
            'body-plain': plain, 'stripped-text': without_quotes(plain),
            'body-html': texts.get('text/html', ''), 'attachment-count': str(count),
            'message-headers': json.dumps(headers)}.items():
        yield name, value.encode(errors='replace'), '', ''


def temporary_file() -> Any:
    """A file without a name, in memory while it is small."""
    import tempfile
    return tempfile.SpooledTemporaryFile(MAIL_PIECE)


def compose(boundary: str, sender: str, to: str, raw: BinaryIO) -> Any:
    """The form for the message in RAW (RFC 7578); what can't be read is there as it came."""
    form = temporary_file()

    def write(name: str, value: bytes, file: str, kind: str) -> None:
        line_end = '\r\n' * (form.tell() > 0)      # of the value before
        if file:
            kind = kind if re.fullmatch(r'[\w.+-]+/[\w.+-]+', kind, re.ASCII) else 'text/plain'
            file = printable(file).replace('"', '%22')
            file = f'; filename="{file}"\r\nContent-Type: {kind}'
        form.write((f'{line_end}--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}'
                    '\r\n\r\n').encode(errors='replace') + value)
    write('recipient', to.encode(), '', '')
    write('sender', sender.encode(), '', '')
    end = form.tell()
    raw.seek(0)
    try:
        for field in read_mail(raw):
            write(*field)
    except Exception:       # whatever a message was made to break: it is the app's to see
        form.seek(end)
        form.truncate()
    raw.seek(0)
    write('body-mime', b'', 'message.eml', 'message/rfc822')
    shutil.copyfileobj(raw, form)
    form.write(f'\r\n--{boundary}--\r\n'.encode())
    form.flush()
    return form


class Reply(LocaltunnelError):
    """What a sender is told instead of yes; with a code of FAREWELLS its connection ends."""


FAREWELLS = '221', '421', '521'


def verdict_on(status: int, text: str) -> str:
    """The reply to a sender whose mail met STATUS of HTTP, with TEXT."""
    code = '250 2.0.0' if status // 100 == 2 else '451 4.3.0'
    if status // 100 == 4 and status not in (408, 425, 429):
        code = '550 5.1.1' if status in (404, 410) else '550 5.7.1'
    return f'{code} {printable(text)[:MAX_TEXT]}'


class Letter:
    """One message: its envelope, and what the client of NAME wants, as [path, whether raw]."""

    def __init__(self, sender: str, utf8: bool) -> None:
        self.sender, self.utf8, self.id = sender, utf8, secrets.token_hex(8)
        self.to: list[str] = []                 # recipients
        self.name, self.wish = '', None         # type: str, Any   # theirs; '' is the postmaster
        self.spooled = 0                        # bytes of the message that are on disk


class PostOffice:
    """Takes mail for the tunnels of a server whose clients want it."""

    def __init__(self, server: Server) -> None:
        self.server, self.disk, self.room = server, Disk(), Budget(MAIL_ON_DISK)
        self.senders: dict[str, int] = collections.Counter()    # connections, by subnet
        self._decoding = asyncio.Semaphore(DECODED_TOGETHER)
        self._turns: Any = weakref.WeakValueDictionary()        # of deliveries, by name

    def wish_of(self, name: str) -> Any:
        """What the client of NAME wants of mail.  Raises HopFailed."""
        tunnel, leases = self.server.tunnels.get(name), self.server.admission.leases
        if tunnel and tunnel.members:
            if 'mail' not in tunnel.members[0].hello.wants:
                raise HopFailed(404, f'{name} takes no mail')
            return tunnel.members[0].hello.wants['mail']
        if leases.owner(name, time.time()) and 'mail' in leases.by_name[name].facts:
            raise HopFailed(503, f'{name} is away; try again later')
        raise HopFailed(404, f'nobody called {name} takes mail here')

    async def deliver(self, letter: Letter, raw: BinaryIO, visitor: Visitor) -> str:
        """Give LETTER, with its message in RAW, to the app; return the reply to VISITOR."""
        now, record = self.server.runtime.now, Record(
            0, self.server.runtime.now(), 'MAIL', f'{letter.name}.{self.server.domain}')
        record.visitor = visitor.address
        try:
            response = await asyncio.wait_for(self._post(letter, raw, visitor), APP_WITHIN)
            status = response.status
            if status // 100 != 2:
                record.why = f'the app says {status}'
        except HopFailed as e:
            status, record.why = e.status, str(e)
        except asyncio.TimeoutError:
            status, record.why = 504, 'the app took too long; try again later'
        reply = verdict_on(status, record.why or f'delivered, as {letter.id}')
        record.status = int(reply[:3])
        self.server.log.exchange(record, now() - record.began)
        return reply

    async def _post(self, letter: Letter, raw: BinaryIO, visitor: Visitor) -> Response:
        (path, as_is), boundary, to = letter.wish, secrets.token_hex(16), ', '.join(letter.to)
        kind, body = 'message/rfc822', raw
        if not as_is:
            kind = f'multipart/form-data; boundary={boundary}'
            async with self._decoding:
                body = await asyncio.wrap_future(
                    Disk().later(compose, boundary, letter.sender, to, raw))
        head = [f'POST {path} HTTP/1.1', f'Host: {letter.name}.{self.server.domain}',
                f'User-Agent: localtunnel/{__version__}', f'Content-Type: {kind}',
                f'Content-Length: {body.tell()}', f'Localtunnel-Mail-From: {letter.sender}',
                f'Localtunnel-Mail-To: {to}', '']
        body.seek(0)

        def message() -> Iterator[bytes]:
            visitor.connection.check()      # who is gone will come again
            if self.wish_of(letter.name) != letter.wish:    # another client is there by now
                raise HopFailed(503, f'{letter.name} has changed; try again later')
            yield '\r\n'.join(head).encode() + visitor.x_forwarded + b'\r\n'
            yield from iter(lambda: body.read(MAIL_PIECE), b'')
        try:
            async with self._turns.setdefault(letter.name, asyncio.Semaphore(POSTED_TOGETHER)):
                return await ask_app(self.server, letter.name, visitor, message())
        finally:
            self.disk.later(body.close)


async def begin_tls(connection: Connection, context: ssl.SSLContext) -> None:
    """Speak TLS on CONNECTION from now on; what came in clear before is dropped (RFC 3207).

    Raises OSError.  Nothing may be awaited before this, or the first bytes of the handshake could
    be read here.
    """
    runtime, before = connection.runtime, connection.transport
    connection.peek()
    connection.read_nowait(NEVER)
    try:
        after: Any = await runtime.loop.start_tls(
            before, connection, context, server_side=True, ssl_handshake_timeout=HANDSHAKE_TIMEOUT)
    except BaseException:
        before.abort()
        connection.connection_lost(None)        # asyncio tells only the handshake
        raise
    runtime.transports.discard(before)
    runtime.transports.add(after)
    connection.transport, connection.secure = after, True


class Postman:
    """The conversation with one sender."""

    def __init__(self, office: PostOffice, connection: Connection) -> None:
        self._office, self._server, self._domain = office, office.server, office.server.domain
        self._connection, self._visitor = connection, self._server.visitors.enter(connection)
        self._helo, self._extended = '', False          # what it calls itself, and by EHLO
        self._letter: Letter | None = None
        self._commands = self._wrong = 0                # since the last message
        connection.timeout = SENDER_IDLE

    async def serve(self) -> None:
        """Answer commands until the sender leaves, or has to."""
        visitor, senders, connection = self._visitor, self._office.senders, self._connection
        subnet, reply = subnet_of(visitor.peer), f'220 {self._domain} ESMTP localtunnel'
        senders[subnet] += 1
        if visitor.refusal or sum(senders.values()) > MAX_SENDERS or (
                senders[subnet] > MAX_SENDERS_OF_ADDRESS and not is_loopback(subnet)):
            reply = '421 4.3.2 too many connections; try again later'
        try:
            while True:
                if reply:
                    await connection.write(f'{reply}\r\n'.encode('ascii', 'replace'))
                if reply[:3] in FAREWELLS:
                    return await connection.linger()
                if connection.unread:
                    await asyncio.sleep(0)
                reply = await self._reply()
        except (LocaltunnelError, OSError):
            pass                    # it is gone
        finally:
            senders[subnet] -= 1
            if not senders[subnet]:
                del senders[subnet]
            self._server.visitors.leave(visitor)
            connection.close()

    async def _reply(self) -> str:
        """The reply to the next command; '' for none."""
        try:
            line = await self._line(self._server.runtime.now())
            if self._server.tunnels.state >= LEAVING:
                raise Reply('421 4.3.2 this server is shutting down')
            reply = await self._answer(line[:-2].decode(errors='surrogateescape'))
        except (Reply, HopFailed) as e:
            reply = str(e) if isinstance(e, Reply) else verdict_on(e.status, str(e))
        self._commands, self._wrong = self._commands + 1, self._wrong + (reply[:1] == '5')
        if self._commands > MAX_COMMANDS or self._wrong > MAX_WRONG_COMMANDS:
            return '421 4.7.0 too many commands that lead to nothing'
        return reply

    async def _answer(self, line: str) -> str:
        """The reply to the command in LINE.  Raises Reply and HopFailed."""
        verb, _, rest = line.partition(' ')
        verb, rest = verb.upper(), rest.strip()
        if verb in ('DATA', 'RSET', 'QUIT', 'STARTTLS') and rest:
            return f'501 5.5.4 nothing follows {verb}'
        if verb in ('HELO', 'EHLO'):
            return self._greet(verb, rest)
        if verb in ('MAIL', 'RCPT'):
            return self._mail(rest) if verb == 'MAIL' else self._rcpt(rest)
        if verb == 'DATA':
            return await self._data()
        if verb == 'STARTTLS' and self._tls:
            self._connection.transport.write(b'220 2.0.0 go ahead\r\n')
            await begin_tls(self._connection, self._tls)
            self._helo, self._letter = '', None
            return ''
        if verb == 'RSET':
            self._letter = None
        return REPLIES.get(verb, '500 5.5.1 this command is not known here')

    async def _line(self, began: float, size: int = 0) -> bytes:
        """The next line of what BEGAN then, and has SIZE bytes until here.

        Raises Reply for what others may take for more lines: they differ in what a bare CR or LF
        means (SMTP smuggling), and how long a line may be.
        """
        connection = self._connection
        line = connection.readline_nowait(MAX_MAIL_LINE)
        while line is None:
            if connection.unread >= MAX_MAIL_LINE:
                raise Reply('521 5.5.2 this line is too long')
            crowd = sum(self._office.senders.values()) > MAX_SENDERS // 2
            until = began + size / MAIL_PACE + (SENDER_HURRY if crowd else SENDER_IDLE)
            try:
                if not await connection.wait_for_data(max(0.0, until - connection.runtime.now())):
                    raise Disconnected('the sender went away')
            except Overdue as e:
                raise Reply('421 4.4.2 this takes too long') from e
            line = connection.readline_nowait(MAX_MAIL_LINE)
        if line == b'\n' or line.find(b'\r') != len(line) - 2:
            raise Reply('521 5.5.2 lines end with CR LF, and neither stands alone')
        return line

    async def _read(self, letter: Letter, raw: BinaryIO) -> str:
        """Read the message of LETTER into RAW; return why it can't be taken, or ''."""
        began, size, why, office = self._server.runtime.now(), 0, '', self._office
        lines, held = [self._trace(letter)], 0      # and their bytes
        for line_number in itertools.count(1):
            line = await self._line(began, size)
            if line == b'.\r\n':
                break
            if line_number % MAIL_TURN == 0:
                await asyncio.sleep(0)
            size += len(line)
            if size > 2 * MAX_MAIL:
                raise Reply('521' + TOO_LARGE[3:])
            if size > MAX_MAIL:
                why = TOO_LARGE
            elif office.room.take(len(line)):
                letter.spooled, held = letter.spooled + len(line), held + len(line)
                lines.append(line[line[:1] == b'.':])
            else:
                why = TOO_MUCH
            if held > MAIL_PIECE:
                await office.disk.do(raw.writelines, lines)
                lines, held = [], 0
        await office.disk.do(raw.writelines, lines)
        await office.disk.do(raw.flush)
        return why

    # Commands.

    @property
    def _tls(self) -> ssl.SSLContext | None:
        """With what this connection may be encrypted, where it is not yet."""
        tls = self._server.tls
        return tls.context if tls and tls.validity[1] and not self._connection.secure else None

    def _greet(self, verb: str, name: str) -> str:
        if not HELO.fullmatch(name):
            return f'501 5.5.4 {verb} takes the name of your host'
        self._helo, self._extended, self._letter = name, verb == 'EHLO', None
        if not self._extended:
            return f'250 {self._domain}'
        offers = self._domain, 'PIPELINING', f'SIZE {MAX_MAIL}', '8BITMIME', 'SMTPUTF8', *(
            ['STARTTLS'] * bool(self._tls))
        return ''.join(f'250-{line}\r\n' for line in offers) + '250 ENHANCEDSTATUSCODES'

    @staticmethod
    def _envelope(word: str, text: str, utf8: bool = False) -> tuple[str, list[str]]:
        """The mailbox that stands in TEXT behind WORD, and the parameters.  Raises Reply."""
        match = ENVELOPE.fullmatch(text)
        if not match or not text.upper().startswith(word):
            raise Reply(f'501 5.1.7 the address is malformed; it must be {word}<USER@HOST>')
        more = match.group(2).upper().split()
        if not (match.group(1).isascii() or utf8 or 'SMTPUTF8' in more):
            raise Reply('553 5.6.7 this address needs SMTPUTF8')
        if not all(map(MAIL_PARAMETER.fullmatch, more)) or more and word == 'TO:':
            raise Reply('555 5.5.4 this parameter is not known here')
        return match.group(1), more

    def _mail(self, text: str) -> str:
        if not self._helo or self._letter:
            return '503 5.5.1 ' + ('RSET first' if self._letter else 'EHLO first')
        sender, more = self._envelope('FROM:', text)
        if any(word.startswith('SIZE=') and int(word[5:]) > MAX_MAIL for word in more):
            return TOO_LARGE
        self._letter = Letter(sender, 'SMTPUTF8' in more)
        return '250 2.1.0 OK'

    def _rcpt(self, text: str) -> str:
        letter = self._letter
        if not letter:
            return '503 5.5.1 MAIL first'
        to, _ = self._envelope('TO:', text, letter.utf8)
        name, _, parent = to.lower().rpartition('@')[2].partition('.')
        if not to:
            return '501 5.1.3 mail is for somebody'
        if len(letter.to) >= MAX_RECIPIENTS:
            return '452 4.5.3 too many recipients; send the message again for the others'
        if to.lower() in ('postmaster', f'postmaster@{self._domain}'):
            name, wish = '', None
        elif parent == self._domain:
            wish = self._office.wish_of(name)
        else:
            return f'550 5.7.1 this server takes mail for NAME.{self._domain}, and relays none'
        if letter.to and letter.name != name:
            return '452 4.5.3 one name at a time; send the message again for the others'
        letter.name, letter.wish = name, wish
        letter.to.append(to)
        return '250 2.1.5 OK'

    def _trace(self, letter: Letter) -> bytes:
        """What stands before the message, for who looks where it comes from (RFC 5321 4.4)."""
        from email import utils
        peer = self._visitor.peer
        how = ('UTF8SMTP' if letter.utf8 else 'ESMTP' if self._extended else 'SMTP') + (
            'S' * self._connection.secure)
        to = f' for <{letter.to[0]}>' if len(letter.to) == 1 else ''
        return (f'Return-Path: <{letter.sender}>\r\n'
                f'Received: from {self._helo} ([{"IPv6:" * (":" in peer)}{peer}])\r\n'
                f'\tby {self._domain} with {how} id {letter.id}{to};\r\n'
                f'\t{utils.formatdate()}\r\n').encode()

    async def _data(self) -> str:
        letter, budget = self._letter, self._server.admission.budget
        if not letter or not letter.to:
            return '554 5.5.1 no valid recipients' if letter else '503 5.5.1 MAIL first'
        if self._office.disk.hangs or not budget.take(
                MAIL_HELD, leave=budget.limit // 2):        # half is for tunnels
            return TOO_MUCH
        self._server.visitors.reserved += 2        # files take descriptors, too
        raw = temporary_file()
        try:
            await self._connection.write(b'354 go ahead, and end with a dot on its own line\r\n')
            why = await self._read(letter, raw)
            if why:
                return why
            self._commands = self._wrong = 0
            if letter.name:
                return await self._office.deliver(letter, raw, self._visitor)
            raw.seek(0)
            text = ' '.join(raw.read(TO_POSTMASTER).decode(errors='replace').split())
            self._server.log.note('mail for the postmaster', event='postmaster', mail=text)
            return f'250 2.0.0 delivered, as {letter.id}'
        except OSError as e:
            raise Reply('421 4.3.1 there is no room on the disk, or it hangs') from e
        finally:
            self._letter = None
            self._server.visitors.reserved -= 2
            budget.give(MAIL_HELD)
            self._office.room.give(letter.spooled)
            self._office.disk.later(raw.close)


def note_of_wish(wish: Any) -> str:
    """What is noted of a client's WISH.  Raises ValueError and TypeError unless [path, raw]."""
    path, as_is = wish
    if not (isinstance(path, str) and MAIL_PATH.fullmatch(path) and isinstance(as_is, bool)):
        raise ValueError('it must be a path of the app, and whether mail comes raw')
    return 'wanted'


def mx_record(domain: str) -> str:
    """What the world has to know."""
    return f'add a DNS record: name *.{domain}, type MX, value 10 {domain}.'


class Mail(Annex):
    """--mail, at both ends."""
    title = 'mail'

    def client_options(self, add: Add) -> None:
        add('--mail', metavar='PATH', help='POST mail to anything@NAME.DOMAIN to PATH of the app')
        add('--mail-raw', action='store_true', help='as message/rfc822, not as a form')

    def server_options(self, add: Add) -> None:
        add('--mail', action='store_true', help='take mail for the tunnels that want it')
        add('--mail-port', type=port_number, default=MAIL_PORT, metavar='PORT',
            help='port for mail; the world knows %(default)s alone (%(default)s)')

    def at_client(self, args: Args, app: App, address: ServerAddress) -> None:
        if not args.mail:
            if args.mail_raw:
                raise UsageError('--mail-raw says how mail comes; add where it goes: --mail PATH')
            return
        path = urllib.parse.quote(args.mail, safe=URL_CHARACTERS)
        if app.target.kind != 'http' or not MAIL_PATH.fullmatch(path):
            raise UsageError('--mail takes a path of an http app, such as --mail /inbox')
        address.wants['mail'] = [path, args.mail_raw]
        app.observer.also('mail', f"to any address at the URL's host is posted to {path}")

    async def at_server(self, args: Args, server: Server) -> None:
        if not args.mail:
            if args.mail_port != MAIL_PORT:
                raise UsageError('--mail-port says where mail comes in; add --mail')
            return
        if is_address(args.domain):
            raise UsageError('--mail needs a --domain with a name: mail goes to NAME.DOMAIN')
        server.limits.offers['mail'] = note_of_wish
        office = PostOffice(server)
        for sock in args.listening.at(args.bind, args.mail_port):
            await server.doors.open(sock, lambda sender: Postman(office, sender).serve())
        server.log.note(f'taking mail on port {sock.getsockname()[1]}' + (
            '' if is_loopback(args.domain) else f'; {mx_record(args.domain)}'))

    def checks(self, args: Args) -> Sequence[Check]:
        domain, port = args.domain, getattr(args, 'mail_port', MAIL_PORT)

        async def mail() -> str:
            """Mail for names below the domain is led here, and taken."""
            resolver, greeting = getattr(args, 'resolver', None) or system_resolver(), b''
            found = resolver and await ask_dns(resolver, f'{secrets.token_hex(8)}.{domain}',
                                               TYPE_MX)
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                reader, writer = await asyncio.wait_for(asyncio.open_connection(
                    getattr(args, 'bind', None) or '127.0.0.1', port), REACHED_WITHIN)
                with contextlib.closing(writer):
                    greeting = await asyncio.wait_for(reader.readline(), REACHED_WITHIN)
            here, led = greeting.split()[1:2] == [domain.encode()], domain.encode() in (found or ())
            if not here:
                raise Finding(f'no server takes mail here, at port {port}', 'start it with --mail, '
                              'and see its log' if led else '', ok=False if led else None)
            if not led:
                where = b', '.join(found or []).decode('latin-1')
                raise Finding(f'an MX record leads mail to {where}' if where else
                              f'no MX record leads mail for names below {domain} here',
                              mx_record(domain))
            return f'an MX record leads it here, and this server takes it at port {port}'
        local = is_loopback(domain) or is_address(domain)
        return [] if local or not getattr(args, 'mail', True) else [mail]


# ------------------------------------------------------------------------------------------------
# 45. Ground
#
# What a server stands on: its state folder, clock, ports, DNS and certificate.  `doctor --domain`,
# of the next room, with which this is one annex, looks at all of it; and the server itself at a
# part, when it starts and once a day.  A check is a method that returns what is right, in words;
# what is wrong, or can't be known, it raises as a Finding.
# ------------------------------------------------------------------------------------------------

CHECK_WITHIN = 20.0             # seconds for one check
MOST_SAID = 4 * MAX_TEXT        # characters: names in a certificate may be many, and long
CLOCK_OFF = 60.0                # seconds between two clocks: Stripe's signatures allow 300
FEW_DESCRIPTORS = 4096          # each request that is under way takes two
ENDS_SOON = 14 * DAY            # of a certificate, or a third of its life: renewal has failed
MOST_ADDRESSES = 8              # of a name, which are tried
ISSUER = 'letsencrypt.org'      # as CAA records name the authority that --acme asks by default
ASKED = 'acme.json'             # in the state folder: its `issuers` are the names of the one asked
# What a server says of itself, by any Host: who visits DOMAIN can tell whether it arrives here.
ITSELF = '/.well-known/localtunnel/server'
SAID = re.compile(rb'localtunnel ([!-~]{1,20}) [0-9a-f]{32}')   # its version, and a random number

async def verdict_of(check: Check, where: str) -> tuple[bool | None, str, str]:
    """(ok, text, cure): what CHECK finds at WHERE, as a Finding has it; True is right."""
    ok: bool | None = False
    try:
        ok, text, cure = True, await asyncio.wait_for(check(), CHECK_WITHIN), ''
    except Finding as e:
        ok, text, cure = e.ok, str(e), e.cure
    except (LocaltunnelError, OSError, asyncio.TimeoutError) as e:
        text, _, cure = explain(e, where).partition('; ')
        cure = cure or 'see what runs there, and what its log says'
    except (ValueError, LookupError) as e:      # from odd answers
        text, cure = f'what is said there makes no sense ({e})', 'see what runs there'
    return ok, printable(text)[:MOST_SAID], printable(cure)[:MOST_SAID]


def visit(runtime: Runtime, place: ServerAddress, ca: str | None, path: str, *lines: str,
          **how: Any) -> contextlib.AbstractAsyncContextManager[tuple[Connection, Response]]:
    """Ask for PATH at PLACE, whose certificate is checked by the system's authorities and CA."""
    tls = tls_to(place, ca)
    return asking(dial_server(runtime, place, tls, '', REACHED_WITHIN),
                  str(place).partition('://')[2], path, *lines, **how)


def compare_clocks(response: Response, where: str) -> str:
    """Compare the clock of this machine with that of WHERE, of which RESPONSE is."""
    try:
        said = read_date(response.find(b'date'))
    except ValueError:
        raise Finding(f'not compared: {where} does not say what time it is', ok=None) from None
    ahead = time.time() - said
    if abs(ahead) > CLOCK_OFF:
        raise Finding(f'the clock of this machine is {abs(ahead):.0f} seconds '
                      f'{"ahead of" if ahead > 0 else "behind"} the one of {where}',
                      'set it right (timedatectl set-ntp true), or the other one')
    return f'as the one of {where}'


def judge_certificate(facts: Any, domain: str, now: float) -> str:
    """Judge a certificate for DOMAIN by its FACTS; others have looked at the chain."""
    since, until, names = validity(facts)
    if not names:
        raise Finding('one of its own, for clients; visitors have plain http', ok=None)
    wanted = [domain] if is_address(domain) else [domain, f'*.{domain}']
    missing = [name for name in wanted if not covers(names, name)]
    if missing:
        raise Finding(f'the certificate is for {", ".join(names[:3])}, not for {missing[0]}',
                      f'get one for {" and ".join(wanted)}')
    days = f'{(until - now) / DAY:.0f} days left'
    if until - now < min(ENDS_SOON, (until - since) / 3):
        raise Finding(f'the certificate has {days}', 'renew it, and see why that has not happened')
    return f'for {", ".join(names[:3])}, signed by an authority, with {days}'


LISTENS = '0A'                  # the state of a socket, in /proc/net/tcp


def who_listens(address: str, port: int) -> str:
    """The program and process that listen at PORT of ADDRESS, as far as Linux tells."""
    packed = socket.inet_aton(address)[::-1].hex().upper() if ':' not in address else ''
    wanted, sockets = [f'{host}:{port:04X}' for host in (packed, 8 * '0', 32 * '0')], set()
    for path in '/proc/net/tcp', '/proc/net/tcp6':
        with contextlib.suppress(OSError), open(path, encoding='ascii') as f:
            sockets |= {f'socket:[{words[9]}]' for words in map(str.split, f)
                        if words[1] in wanted and words[3] == LISTENS}
    for path in glob.iglob('/proc/[0-9]*/fd/*') if sockets else ():
        with contextlib.suppress(OSError):
            if os.readlink(path) in sockets:
                process = path.split('/')[2]
                with open(f'/proc/{process}/comm', encoding='utf-8') as f:
                    return f'{f.read().strip()} (process {process})'
    return 'another program' if sockets else ''


class Ground:
    """The checks of the machine and the domain of a server, whether that runs or not."""

    def __init__(self, args: Args, runtime: Runtime, itself: bytes = b'') -> None:
        """ARGS are those of the server, or of `doctor`; ITSELF is what the server says there."""
        self._args, self._runtime, self._itself = args, runtime, itself
        self.domain, self._folder = args.domain.strip('[]'), state_folder(args.state)
        local = is_loopback(self.domain)
        self._ports = (args.port or (8080 if local else 80), False), (args.tls_port, True)
        outward, bound = [] if local else outward_addresses(), getattr(args, 'bind', None)
        self._here = [bound.strip('[]')] if bound else outward or ['127.0.0.1']
        self._who = ''                              # the program that is the server, if it runs
        self._found: dict[str, list[str]] = {}      # addresses, by the names that were looked up
        self._delegated = f'_acme-challenge.{self.domain}'
        self._resolver: Any = getattr(args, 'resolver', None) or system_resolver()
        in_dns = self._resolver and not (local or is_address(self.domain))
        self._acme = in_dns and glob.glob(os.path.join(glob.escape(self._folder), 'acme*'))
        self.others: Sequence[Check] = getattr(args, 'checks', list)()     # of other annexes
        self.checks: Sequence[Check] = (        # port 53 is what most often stands in the way
            *[self.dns_port] * bool(self._acme), self.state, self.clock, self.ports,
            self.descriptors, *[self.dns, self.zone] * bool(in_dns),
            *[self.ns, self.caa] * bool(self._acme), self.certificate, *self.others)

    # The machine.

    async def state(self) -> str:
        folder = self._folder
        if not os.path.exists(folder):
            raise Finding(f'{folder} is not there yet; a server makes it', ok=None)
        if not (os.path.isdir(folder) and os.access(folder, os.R_OK | os.W_OK | os.X_OK)):
            raise Finding(f"this user can't use the state folder {folder}", 'be the user of the '
                          'server, say with sudo, or name its folder with --state')
        given = [getattr(self._args, name, None) for name in ('key', 'token_file', 'cert')]
        for path in filter(None, given):
            if not os.access(path, os.R_OK):
                raise Finding(f"the server can't read {path} any more", 'let it: it goes on with '
                              'what it has read, and will not start again')
        for path, bit, what in ((folder, 0o002, 'change'), (given[0], 0o004, 'read'),
                                (given[1], 0o004, 'read')):
            if path and os.name == 'posix' and os.stat(path).st_mode & bit:
                raise Finding(f'every user of this machine can {what} {path}',
                              f'say: chmod o-rwx {path}')
        return f'{folder} can be used, and not by everybody'

    async def clock(self) -> str:
        """The clock is after this program was written, and as the one of --server."""
        written = os.stat(own_path()).st_mtime if own_path() else 0.0
        if time.time() < written - DAY:
            raise Finding('the clock of this machine is before the day when this program was '
                          'written', 'set it right (timedatectl set-ntp true)')
        if not getattr(self._args, 'server', None):
            return 'not before this program was written; --server URL names one to compare with'
        place = server_address(self._args.server)
        async with visit(self._runtime, place, self._args.ca, '/') as (_, response):
            return compare_clocks(response, str(place))

    # Its ports.

    async def _who_is(self, address: str, port: int, tls: bool) -> bytes | None:
        """What a server says of itself at PORT of ADDRESS; b'' for others, None for nobody."""
        try:
            way = client_tls(check=False) if tls else None
            _, said = await ask_whole(connect(self._runtime, address, port, way, self.domain),
                                      bracketed(self.domain), ITSELF)
            return said if SAID.fullmatch(said) else b''
        except (ssl.SSLError, LocaltunnelError):
            return b''
        except (OSError, asyncio.TimeoutError):
            return None

    async def ports(self) -> str:
        """This server answers at its ports, wherever anything does."""
        told = []
        for (port, tls), address in itertools.product(self._ports, self._here):
            said = await self._who_is(address, port, tls)
            who = who_listens(address, port)
            if said and self._itself in (b'', said):
                self._itself, self._who = said, who
                told.append(f'version {said.split()[1].decode()} at port {port} of {address}')
            elif who and who == self._who:
                told.append(f'it has port {port}, and no certificate yet')
            elif who or said is not None:
                raise Finding(f'{who or "another program"} has port {port} of {address}',
                              f'end it, or give the server another port with --{"tls-" * tls}port')
        if not self._itself:
            raise Finding(f'no server answers at {", ".join(self._here)}', 'start it: python3 '
                          f'localtunnel.py server --domain {self.domain}; or name its --port here')
        return ', '.join(told)

    async def descriptors(self) -> str:
        match = re.search('process ([0-9]+)', self._who)
        if not match:
            raise Finding('not looked at: this user does not see the server', ok=None)
        import resource
        most, _ = resource.prlimit(int(match.group(1)), resource.RLIMIT_NOFILE)
        if most < FEW_DESCRIPTORS:
            raise Finding(f'the server may have {most} open, and a request takes two',
                          'say LimitNOFILE=65536 in its systemd unit, or ulimit -n 65536 before it')
        return f'the server may have {most} open'

    async def dns_port(self) -> str:
        port, hosts = self._args.dns_port, self._args.dns_bind or self._here
        for address in hosts:
            if not await ask_dns((address, port), self._delegated, TYPE_SOA):
                who = who_listens(address, port) or 'nobody who answers DNS'
                raise Finding(f'{who} has port {port} of {address}',
                              "end what is there, and see the server's log")
        return f'this server answers at port {port} of {", ".join(hosts)}'

    # The domain, as the world sees it.

    async def _elsewhere(self, address: str) -> str:
        """Why ADDRESS is not that of this server; '' if it is, or nobody can tell from inside."""
        if way_to(address) == address or is_loopback(address):
            return ''
        said = await asyncio.gather(*(self._who_is(address, port, tls) for port, tls in (
            (80, False), (443, True), *self._ports)))
        if self._itself in said:
            return ''
        if self._itself and said != 4 * [None]:
            return 'where another server answers (behind a router, try it from outside)'
        return public_address() and f'and this machine has the address {public_address()}'

    async def dns(self) -> str:
        """DNS leads the domain, and the names below it, here."""
        records: dict[str, str] = {}        # which lead there, by address
        for record in self.domain, f'*.{self.domain}':
            host = record.replace('*', secrets.token_hex(8))
            found = (await addresses_in_dns(self._resolver, host))[:MOST_ADDRESSES]
            self._found[host] = found
            if not found:
                raise Finding(f'DNS has no address for {record}',
                              f'add a DNS record: {record_here(record)}')
            records = {**dict.fromkeys(found, record), **records}
        for address, why in zip(records, await asyncio.gather(*map(self._elsewhere, records))):
            if why:
                raise Finding(f'DNS leads {records[address]} to {address}, {why}',
                              f'add a DNS record: {record_here(records[address])}')
        return f'{self.domain} and the names below it are {", ".join(records)}'

    async def zone(self) -> str:
        """The zone's own server says what the world sees."""
        labels, servers = self.domain.split('.'), []       # type: list[str], list[bytes]
        for i in range(len(labels) - 1):
            servers = servers or await ask_dns(
                self._resolver, '.'.join(labels[i:]), TYPE_NS) or []
        name = min(servers, default=b'').decode('latin-1')
        places = name and await addresses_in_dns(self._resolver, name)
        if not places:
            raise Finding('not looked at: its servers are not known', ok=None)
        for host, seen in self._found.items():
            theirs = {str(ipaddress.ip_address(data))
                      for data in await ask_dns((places[0], DNS_PORT), host, TYPE_A) or ()}
            if theirs and not theirs & set(seen):
                raise Finding(f'{name} leads {host} to {", ".join(theirs)}: the record was '
                              'changed, and the old one is still remembered elsewhere', ok=None)
        return f'{name} says the same'

    async def ns(self) -> str:
        """An authority that asks for the proof comes to this server."""
        found = await ask_dns(self._resolver, self._delegated, TYPE_NS)
        record = f'name {self._delegated}, type NS, value {self.domain}.'
        if found is None:
            raise Finding(f'nobody answers for {self._delegated}', 'let port 53 (UDP and TCP) '
                          f'through to this machine; the record is: {record}')
        if self.domain.encode() not in found:
            raise Finding(f'no NS record leads {self._delegated} to {self.domain}, so there is no '
                          'https for names below it', f'add a DNS record: {record}')
        return f'{self._delegated} leads to {self.domain}'

    async def caa(self) -> str:
        """The authority may issue for the domain, and for names below it."""
        issuers = [ISSUER]
        with contextlib.suppress(Exception), open_file(os.path.join(self._folder, ASKED)) as f:
            issuers = list(map(str, json.load(f)['issuers']))
        if not issuers:
            raise Finding('not looked at: the authority does not say by which name CAA records '
                          'know it', ok=None)
        both = self.domain, f'*.{self.domain}'
        for where, host, tag, values in await caa_terms(self._resolver, self.domain, both):
            if not {value.partition(';')[0].strip() for value in values} & {*issuers}:
                raise Finding(f'CAA records of {where} do not let {issuers[0]} issue for {host}',
                              f'add a DNS record: name {where}, type CAA, value 0 {tag} '
                              f'"{issuers[0]}"; or give the server another --acme-directory')
        return f'{issuers[0]} may issue for all of it'

    async def certificate(self) -> str:
        tls = client_tls(getattr(self._args, 'ca', None))
        tls.check_hostname = False      # the names are looked at below
        with contextlib.suppress(OSError):      # it has no names
            tls.load_verify_locations(os.path.join(self._folder, 'self-signed.pem'))
        try:
            dial = connect(self._runtime, self._here[0], self._args.tls_port, tls, self.domain)
            connection = await asyncio.wait_for(dial, REACHED_WITHIN)
            facts = connection.transport.get_extra_info('peercert')
            connection.abort()
        except (OSError, asyncio.TimeoutError) as e:
            fault, _, cure = tls_fault(
                e, self.domain, 'name the authority to clients and to doctor, with --ca FILE, or '
                'get one from a public authority').partition('; ')
            if fault or self._acme:
                raise Finding(fault or 'this server has none yet',
                              cure or 'see its log: it says what is missing') from e
            raise Finding('none that can be seen here; visitors have plain http', ok=None) from e
        return judge_certificate(facts, self.domain, time.time())


# ------------------------------------------------------------------------------------------------
# 46. Doctor
#
# `doctor` names the first thing that is wrong on the way of a request, and what helps: beside a
# client, for a URL, or on the ground of a server; and that looks at itself.
# ------------------------------------------------------------------------------------------------

SAMPLE = 512 * KIB              # bytes that go up and down: 5 s at 1 Mbit/s
STREAM_WITHIN = 3.0             # for the first piece of an answer, of which more is to come
HEADERS, LEAST_HEADERS = (60, 31, 15, 7, 3), 7      # KiB of one field; nginx takes 8, less a bit
UPGRADE = 'Connection: Upgrade', 'Upgrade: websocket'
KEY_OF_US = 'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=='       # with its answer, from RFC 6455 1.3
ACCEPTED = 'Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo='
FRAME_UP = b'\x81\x8b\0\0\0\0localtunnel'       # with a mask that changes nothing
FRAME_DOWN = b'\x81\x0blocaltunnel'

RECIPES = 'configure it as README says under "A proxy in front"'
NOBODY = 'something on the way'         # that does not say so
# Who stands in front, by the header lines of answers, and how to let everything pass.
FRONTS = (
    ('Cloudflare', r'cf-ray:|server: *cloudflare', 'set the DNS record to "DNS only"'),
    ('Envoy', r'x-envoy-|server: *envoy', f'allow "{PROTOCOL}" in its upgrade_configs'),
    ('nginx', r'server: *nginx', RECIPES),
    ('a proxy', r'(?:server|via|x-cache):', RECIPES),
    (NOBODY, '', 'ask who runs the network, or try another one'))

LOOK_AT = {                     # by the hop that failed
    'app': 'see whether the app runs on the port that the client was given, and what it logs',
    'client': 'start the client, or see what it prints, and run doctor beside it',
    'relay': 'compare this URL with the one that the client prints; --auth, --allow, --rate and '
             'block refuse visitors, too'}


def front_of(response: Response) -> tuple[str, str]:
    """(who, cure) of what stands in front of the server that RESPONSE is of, if anything does."""
    lines = response.block.decode('latin-1')
    return next((who, cure) for who, words, cure in FRONTS
                if re.search(f'(?im)^(?:{words})', lines))


def milliseconds(began: float) -> str:
    """How long it is since BEGAN, of time.monotonic."""
    return f'{(time.monotonic() - began) * 1e3:.1f} ms'


def rate(began: float) -> str:
    """How fast a sample went that BEGAN then."""
    return f'{SAMPLE * 8e-6 / max(1e-9, time.monotonic() - began):.1f} Mbit/s'


async def answer_ourselves(connection: Connection) -> None:
    """Be the app at the end of the tunnel, for one request: send its body back."""
    try:
        head = await read_head(connection, CHECK_WITHIN, MAX_HEAD, MAX_FIELDS)
        request = parse_request(head or b'')
        body = await read_whole(body_reader(connection, request.length), SAMPLE)
        if request.target == b'/websocket':
            await connection.write('\r\n'.join(
                ['HTTP/1.1 101 Switching Protocols', *UPGRADE, ACCEPTED, '', '']).encode())
            if await connection.read() == FRAME_UP:
                await connection.write(FRAME_DOWN)
        elif request.target == b'/streaming':
            await connection.write(b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n'
                                   b'5\r\nfirst\r\n')
            await connection.wait_for_data(CHECK_WITHIN)        # until the visitor has gone
        else:
            await connection.write(Own(200, HTML, [body]).whole('Connection: close'))
        await connection.linger()
    except (LocaltunnelError, OSError):
        connection.abort()


class Way:
    """The checks from a client to its server, and through a tunnel to an app of ours."""

    def __init__(self, runtime: Runtime, known: Any, app: App, client: Client) -> None:
        """KNOWN, APP and CLIENT are what `client` would make of the same words."""
        self.runtime, self.known, self.client, self._app = runtime, known, client, app
        app.upstreams.dialers['doctor'] = dial_inside(runtime, answer_ourselves)
        self.where, self.front = str(client.address), ('', '')
        self._places: list[str] = []        # the addresses of the server
        self._response: Any = None          # of the server, to no more than a question
        self._refusal: Any = None           # why there is no tunnel
        self._running: asyncio.Task[None] | None = None
        self.needed: list[Check] = [            # each by those that follow
            self.server, self.dns, self.connect, self.tls, self.http, self.upgrade,
            self.token, self.tunnel, self.visitor]
        self.others: list[Check] = [
            self.clock, self.body, self.streaming, self.websocket, self.headers]

    async def close(self) -> None:
        """Close the tunnel."""
        self._app.close()
        if self._running:
            await end_task(self._running)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.client.stop(), LINGER)

    def _check(self, passes: bool, wrong: str) -> None:
        """Raises Finding, with what is WRONG with who stands in front, unless all PASSES."""
        if not passes:
            who, cure = self.front
            raise Finding(f'{who} {wrong}', cure)

    # To the server.

    async def server(self) -> str:
        return f'{self.where} ({self.known.source})' + (
            ', through the proxy of the environment' if self.client.address.route else '')

    async def dns(self) -> str:
        site = self.client.address.site
        if self.client.address.route:
            return 'the proxy asks it'
        try:
            found = [str(place[0]) for host in addresses(site) for *_, place in
                     await self.runtime.loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
        except socket.gaierror as e:
            raise Finding(explain(e, self.where),
                          'check how it is spelled, or add a DNS record') from e
        self._places = list({':' in place: place for place in found}.values())
        return f'{site} is {", ".join(found)}'

    async def connect(self) -> str:
        """Try the proxy, or an address of each family."""
        address, good, bad = self.client.address, [], []
        if address.route:
            (await address.route(address.site, address.port)).close()
            return 'the proxy does it'
        for place in self._places:
            began = time.monotonic()
            try:
                dial = connect(self.runtime, place, address.port)
                (await asyncio.wait_for(dial, REACHED_WITHIN)).abort()
                good.append(f'{place} answers in {milliseconds(began)}')
            except (OSError, asyncio.TimeoutError) as e:
                bad.append(explain(e, f'port {address.port} of {place}'))
        if not good:
            raise Finding(', '.join(bad),
                          'start the server there, or see what its firewall lets through')
        return ', '.join(good + bad)

    async def tls(self) -> str:
        connection = await self.client.dial(REACHED_WITHIN)
        shown = connection.transport.get_extra_info('peercert')
        connection.abort()
        if not connection.secure:
            raise Finding('none: what is sent there can be read on the way', ok=None)
        if not shown:
            return 'the certificate is the one of the pin'
        _, until, names = validity(shown)
        issuer = dict(pair for part in shown['issuer'] for pair in part)
        who = issuer.get('organizationName') or issuer.get('commonName')
        return (f'{who} signed it for {", ".join(names[:3])}, with '
                f'{(until - time.time()) / DAY:.0f} days left')

    async def http(self) -> str:
        response, said = await ask_whole(self.client.dial(REACHED_WITHIN),
                                         self.where.partition('://')[2], ITSELF)
        self._response, self.front = response, front_of(response)
        who, where = self.front[0], response.find(b'location')[:MAX_TEXT]
        if SAID.fullmatch(said) or response.has(b'localtunnel-failed'):
            return 'a localtunnel server answers' + (f', behind {who}' if who != NOBODY else '')
        if response.status in PROXY_FAILED:
            raise Finding(f'{who} in front answers {response.status}: the server behind it is down',
                          'start the server, or run doctor on its machine')
        raise Finding(f'{self.where} answers {response.status}, not as a localtunnel server does',
                      f'name {where} with --server' if where else
                      'compare the address with the one that the server printed')

    async def clock(self) -> str:
        return compare_clocks(self._response, self.where)

    async def upgrade(self) -> str:
        """A session can be opened; why there is no tunnel then, the next checks say."""
        self._running = running = asyncio.ensure_future(self.client.run())
        await look_until(lambda: running.done() or self.client.welcomed.is_set(), CHECK_WITHIN)
        self._refusal = running.exception() if running.done() else None
        self._check(getattr(self._refusal, 'code', '') != 'no_upgrade',
                    f'does not let "Upgrade: {PROTOCOL}" pass')
        if self._refusal and not isinstance(self._refusal, Refused):
            raise self._refusal
        return f'"Upgrade: {PROTOCOL}" passes'

    async def token(self) -> str:
        if getattr(self._refusal, 'code', '') in ('token', 'blocked', 'slow_down'):
            raise self._refusal
        return 'accepted' if self.known.token else 'none is needed'

    async def tunnel(self) -> str:
        if getattr(self._refusal, 'code', '') == 'name_taken':      # its one place is in use
            self.needed.clear()
            del self.others[1:]     # all but the clock
            raise Finding(f'{self._refusal}; so the rest is not looked at', ok=None)
        if self._refusal:
            raise self._refusal
        return f'open at {self.client.url}'

    # Through the tunnel, as a visitor.

    def _ask(self, path: str, *lines: str, **how: Any
             ) -> contextlib.AbstractAsyncContextManager[tuple[Connection, Response]]:
        place = server_address(self.client.url)
        place.route = self.client.address.route
        return visit(self.runtime, place, self.known.ca, path, *lines, **how)

    async def visitor(self) -> str:
        site, began = server_address(self.client.url).site, time.monotonic()
        every = f'*.{site.partition(".")[2]}'
        try:
            async with self._ask('/') as (_, response):
                self._check(response.status == 200, f'answers {response.status} in its place')
        except socket.gaierror as e:
            raise Finding(f'DNS has no address for {site}', f'add a record for all names: name '
                          f'{every}, with the address of the server') from e
        except Refused as e:
            raise Finding(str(e).partition(' (')[0], 'let the server have a certificate for '
                          f'{every}, too') from e
        return f'is answered in {milliseconds(began)}'

    async def body(self) -> str:
        """What our app sends back is what it was sent."""
        sample = b'<html><body>' + os.urandom(SAMPLE - 26) + b'</body></html>'    # tempting
        began = time.monotonic()
        async with self._ask('/', body=sample, within=CHECK_WITHIN) as answer:
            up, began = rate(began), time.monotonic()
            said = await read_answer(*answer, SAMPLE)
        self._check(said == sample, 'changes the bodies that pass')
        return f'{up} up, {rate(began)} down, unchanged'

    async def streaming(self) -> str:
        first = b''
        with contextlib.suppress(Overdue):
            async with self._ask('/streaming', within=STREAM_WITHIN) as (connection, _):
                first = await connection.read()
        self._check(b'first' in first, 'keeps an answer back until it is complete')
        return 'an answer arrives piece by piece'

    async def websocket(self) -> str:
        echoed = b''
        async with self._ask('/websocket', *UPGRADE, KEY_OF_US,
                             'Sec-WebSocket-Version: 13') as (connection, response):
            if response.status == 101:
                await connection.write(FRAME_UP)
                echoed = await connection.read()
        self._check(echoed == FRAME_DOWN, f'does not let WebSockets pass ({response.status})')
        return 'frames pass both ways'

    async def headers(self) -> str:
        largest = 0
        for size in HEADERS:
            with contextlib.suppress(LocaltunnelError, OSError):
                async with self._ask('/', f'X-Doctor: {"x" * size * KIB}') as (_, response):
                    if response.status == 200:
                        largest = size
                        break
        self._check(largest >= LEAST_HEADERS, f'lets no more than {largest} KiB of them pass')
        return f'up to {largest} KiB of them pass'


async def explain_answer(runtime: Runtime, place: ServerAddress, ca: str | None, path: str) -> str:
    """What answers at PATH of PLACE, unless that is an error."""
    async with visit(runtime, place, ca, path) as (connection, response):
        hop, status, (who, _) = (
            response.find(b'localtunnel-failed'), response.status, front_of(response))
        said = await read_answer(connection, response) if hop else b''
    if hop in LOOK_AT:
        raise Finding(f'the {hop.replace("relay", "server")} says '
                      + said[:MAX_TEXT].decode('latin-1').strip(), LOOK_AT[hop])
    if status >= 400:
        raise Finding(f'{status} comes from the app, or from {who}: this page is not ours',
                      'see the logs of the app and the client, and run doctor on the server')
    return f'{status}, which is none of our error pages'


async def report(args: Args, where: str, needed: Sequence[Check],
                 others: Sequence[Check] = ()) -> int:
    """Say what all checks find, up to one of those NEEDED that fails; return the exit code."""
    first = ''
    for check in itertools.chain(needed, others):       # one may end them
        name = check.__name__
        ok, text, cure = await verdict_of(check, where)
        whole = text + (cure and f'; {cure}')
        print_line(json.dumps({'check': name, 'ok': ok, 'text': text, 'cure': cure})
                   if args.json else
                   f'{ {True: "ok", False: "BAD", None: "-"}[ok]:3} {name:11} {whole}')
        if ok is False:
            first = first or f'{name}: {whole}'
            if check in needed:
                break
    if not args.json:
        print_line(f'\nMend this first: {first}' if first else
                   '\nEverything that was looked at is right.')
    return int(first != '')


DOCTOR_EPILOG = """examples:
  localtunnel.py doctor                               beside a client
  localtunnel.py doctor --domain t.example.com        on the server (with sudo)
  localtunnel.py doctor https://shop.t.example.com    where something fails"""


class Doctor(Annex):
    """`doctor`, and what a server finds out by itself: the look at start, and those that follow."""

    async def run(self, args: Args, server: Server) -> None:
        itself = f'localtunnel {__version__} {secrets.token_hex(16)}'.encode()
        server.pages.everywhere[ITSELF.encode()] = lambda _: ('text/plain', [itself])
        while not is_loopback(args.domain):
            await self.look(args, server, Ground(args, server.runtime, itself))
            await asyncio.sleep(DAY)
        await super().run(args, server)

    @staticmethod
    async def look(args: Args, server: Server, ground: Ground) -> None:
        """Log what is wrong on the GROUND of SERVER; the keeper of --acme tells of certificates."""
        names = ['state', 'clock', 'dns'] + ['certificate'] * (not getattr(args, 'acme', None))
        for check in ground.checks:
            if check.__name__ in names or check in ground.others:
                ok, text, cure = await verdict_of(check, args.domain)
                if ok is False:
                    server.log.note(f'warning: {text}; {cure}')

    def commands(self, add: Callable[..., argparse.ArgumentParser]) -> None:
        parser = add('doctor', help='say what is wrong, and what helps', epilog=DOCTOR_EPILOG,
                     usage='%(prog)s [URL] [OPTION ...]')
        option = parser.add_argument
        option('url', metavar='URL', nargs='?', help='what a visitor opens')
        option('--json', action='store_true', help='one JSON object a line: check, ok, text, cure')
        option('--ca', metavar='FILE', help='also trust this authority')
        option = parser.add_argument_group('beside a client').add_argument
        option('--join', metavar='CODE', help='the code for the server')
        option('--server', metavar='URL', help='the server (LOCALTUNNEL_SERVER, or the last one)')
        option('--token', help='token that the server asks for (LOCALTUNNEL_TOKEN)')
        option('--pin', metavar='SHA256', help='accept only this certificate of the server')
        option = parser.add_argument_group('on a server').add_argument
        option('--domain', type=str.lower, help='look at the server for DOMAIN on this machine')
        option('--state', metavar='DIR', help='its state folder')
        option('--port', type=port_number, help='its port for http (80)')
        option('--tls-port', type=port_number, metavar='PORT', default=USUAL_PORTS['https'],
               help='its port for https (%(default)s)')
        option('--dns-port', type=port_number, metavar='PORT', default=DNS_PORT,
               help='its port for DNS (%(default)s)')
        option('--dns-bind', action='append', metavar='ADDRESS',
               help='its address for DNS (those of this machine; repeatable)')
        option('--resolver', type=place_of_resolver, metavar='ADDRESS[:PORT]',
               help="whom to ask what the world sees (the system's)")
        parser.set_defaults(run=self.doctor)

    def doctor(self, args: Args) -> int:
        """Look at what ARGS mean; return the exit code."""
        logging.getLogger('asyncio').disabled = True    # the checks tell what peers do
        return asyncio.run(self.examine(args))

    async def examine(self, args: Args) -> int:
        """The same, in the loop that runs."""
        runtime = Runtime(asyncio.get_running_loop())
        try:
            if args.url:
                scheme, host, port, path = split_url(
                    args.url if '://' in args.url else 'https://' + args.url, ('https', 'http'))
                place = server_address(f'{scheme}://{authority(scheme, host, port)}')

                async def answer() -> str:
                    return await explain_answer(runtime, place, args.ca, path or '/')
                return await report(args, str(place), [answer])
            if args.domain:
                return await report(args, args.domain, [], Ground(args, runtime).checks)
            if args.state:
                raise UsageError('--state is of a server on this machine; add --domain DOMAIN')
            made = args.as_client(args, runtime, Target('doctor', text='doctor'))
            if made is None:
                raise UsageError('no server is known here; name one with --server URL or --join '
                                 'CODE, or, on its own machine, with --domain DOMAIN')
            way = Way(runtime, *made)
            try:
                return await report(args, way.where, way.needed, way.others)
            finally:
                await way.close()
        finally:
            await runtime.close()


# ------------------------------------------------------------------------------------------------
# 47. Landing page
#
# What a server shows under its own name: what to type, this file, and whom to ask.
# ------------------------------------------------------------------------------------------------

LANDING = """
<p>Give the program on port 8000 of your machine a public URL:</p>
<pre>curl -fsSLO {address}/localtunnel.py
python3 localtunnel.py client 8000{join}</pre>
{whom}<p>On Windows, type <code>curl.exe</code> and <code>py</code>. To run it without a file:</p>
<pre>curl -fsSL {address}/localtunnel.py | python3 - client 8000{join}</pre>
{report}"""
WHOM = '<p>This server is private, so it asks for a code. You get one from {operator}.</p>\n'
REPORT = '<p>Each site here belongs to who opened it. Report a harmful one to {operator}.</p>\n'
SECURITY_TEXT_HOLDS = 30 * DAY      # as RFC 9116 wants it, less than a year


def mail_or_url(text: str) -> str:
    """An address for mail, or of a page."""
    text = re.sub('^mailto:', '', text)
    if not re.fullmatch(r'[!-~]{1,64}@[!-~]{1,189}|https://[!-~]{1,245}', text):
        raise argparse.ArgumentTypeError(f'{text!r} is not a mail address or an https URL')
    return text


def uri_of(contact: str) -> str:
    """CONTACT as a link leads there."""
    return contact if '://' in contact else f'mailto:{urllib.parse.quote(contact, safe="@")}'


def landing_page(private: bool, contact: str, address: str) -> tuple[str, Sequence[bytes]]:
    """The page on the bare domain, of a server whose operator has this CONTACT."""
    operator = 'its operator'
    if contact:
        operator = f'<a href="{html.escape(uri_of(contact))}">{html.escape(contact)}</a>'
    text = LANDING.format(address=html.escape(address), join=' --join' if private else '',
                          whom=WHOM.format(operator=operator) if private else '',
                          report=REPORT.format(operator=operator) if contact else '')
    return HTML, [PAGE.format(title='localtunnel', text=text).encode()]


def security_text(contact: str, address: str) -> tuple[str, Sequence[bytes]]:
    """Whom to tell of what is wrong with this server (RFC 9116)."""
    text = f'Contact: {uri_of(contact)}\nExpires: {rfc3339(time.time() + SECURITY_TEXT_HOLDS)}\n'
    return 'text/plain; charset=utf-8', [text.encode()]


def script_page(address: str) -> tuple[str, Sequence[bytes]]:
    """This file, with the server's ADDRESS written into it.  Raises HopFailed.

    The large pieces are the same for all: visitors choose what address they see.
    """
    try:
        before, after = own_source()
    except (OSError, ValueError, AttributeError) as e:
        raise HopFailed(404, 'this server was started from a pipe, so it has no copy of itself to '
                        'hand out') from e
    return 'text/x-python; charset=utf-8', (before, b'STAMPED_SERVER = %a' % address, after)


def unlisted(response: Response, block: bytes) -> bytes:
    """At a server that is open to anyone search engines are asked to list no tunnel."""
    decided = response.status == 101 or response.has(b'x-robots-tag')
    return block if decided else block + b'X-Robots-Tag: noindex\r\n'


class LandingPage(Annex):
    """The page, the script that it hands out, and what else an open server owes to strangers."""
    title = 'the landing page'

    def server_options(self, add: Add) -> None:
        add('--contact', type=mail_or_url, metavar='MAIL|URL',
            help='of whom people ask for a code, and whom they tell of misuse')

    async def at_server(self, args: Args, server: Server) -> None:
        server.pages[b'/'] = functools.partial(
            landing_page, not server.admission.tokens.open, args.contact)
        server.pages[b'/localtunnel.py'] = script_page
        if args.contact:
            server.pages[b'/.well-known/security.txt'] = functools.partial(
                security_text, args.contact)
        if args.open:
            server.onward.changes.append(unlisted)
            if not args.contact and not is_loopback(server.domain):
                server.log.note('warning: anyone may open tunnels here, and nobody can tell you '
                                'that one is harmful; add --contact MAIL or --contact URL')


# ------------------------------------------------------------------------------------------------
# 48. Verifying
#
# `verify` compares the script that a server hands out with this file.  Nothing of it is run.  Each
# byte has to be the same, but for one line, in which an address may stand.
# ------------------------------------------------------------------------------------------------

MAX_SCRIPT = 4 * MIB            # of a server's script; ours has less than one
SCRIPT_WITHIN = 60.0            # for all of it, however slowly it comes: 100 kbit/s
SHOWN = 200                     # characters of a line that differs

VERIFY_EPILOG = """Ends with 0 where both are the same, but for the address that a server writes
into what it hands out.

examples:
  localtunnel.py verify https://t.example.com
  localtunnel.py verify https://t.example.com --pin SHA256"""


async def script_of(args: Args) -> bytes:
    """What the server that ARGS name hands out.  Raises LocaltunnelError."""
    runtime = Runtime(asyncio.get_running_loop())
    try:
        known, app, client = args.as_client(args, runtime, Target('verify', text='verify'))
        app.close()
        try:
            response, script = await asyncio.wait_for(ask_whole(
                client.dial(REACHED_WITHIN), str(known.address).partition('://')[2],
                '/localtunnel.py', most=MAX_SCRIPT), SCRIPT_WITHIN)
        except (Disconnected, BadHttp, OSError, asyncio.TimeoutError) as e:
            raise LocaltunnelError(explain(e, str(known.address))) from e
    finally:
        await runtime.close()
    if response.status != 200 or len(script) > MAX_SCRIPT:
        said = response.find(b'location') or script[:SHOWN].decode(errors='replace')
        raise LocaltunnelError(f'{known.address} hands out no script, but says {response.status}: '
                               f'{printable(said[:SHOWN].strip())}')
    return script


class Verifying(Annex):
    """The command `verify`."""

    def commands(self, add: Callable[..., argparse.ArgumentParser]) -> None:
        parser = add('verify', epilog=VERIFY_EPILOG, usage='%(prog)s URL [OPTION ...]',
                     help="compare a server's script with this file")
        parser.add_argument('server', metavar='URL', help='the server')
        parser.add_argument('--ca', metavar='FILE', help='also trust this authority')
        parser.add_argument('--pin', metavar='SHA256', help='accept only this certificate of it')
        parser.set_defaults(run=self.verify, token='none')      # and of ours none is asked for

    @staticmethod
    def verify(args: Args) -> int:
        """Do what ARGS say; return the exit code."""
        ours, args.server = original(), re.sub(r'(?<!/)/(localtunnel[.]py)?$', '', args.server)
        script = asyncio.run(script_of(args))
        theirs, digest = STAMPED.sub(UNSTAMPED, script, count=1), digest_of(ours)
        if theirs == ours:
            stamp = STAMPED.search(script)
            address = stamp.group().decode().split("'")[1] if stamp else ''
            print_line(f'{args.server} hands out this file, and the address in it is '
                       f'{address or "none"}; SHA-256 {digest}')
            return 0
        pairs = itertools.zip_longest(*(text.split(b'\n') for text in (ours, theirs)),
                                      fillvalue=b'(none)')
        number, lines = next((n, pair) for n, pair in enumerate(pairs, 1) if pair[0] != pair[1])
        here, there = (printable(line.decode(errors='replace')[:SHOWN]) for line in lines)
        print_line(f'{args.server} hands out another file; the first line that differs is {number}:'
                   f'\n  here   {here}\n  there  {there}\n'
                   f'SHA-256 here   {digest}\nSHA-256 there  {digest_of(theirs)}')
        return 1


# ------------------------------------------------------------------------------------------------
# 49. Token files
#
# The tokens of a server by user, each with its limits: a line each, or the hash of one.  Who loses
# a token loses the tunnels that it opened.
# ------------------------------------------------------------------------------------------------

MEMBERS = 'members'             # a token file in the state folder, for those who are invited
DATE = re.compile('[0-9T:-]{10,}')


def make_grant(user: str, digest: str, words: Sequence[str]) -> Grant:
    """What WORDS allow: names=GLOB,... ports=A-B tunnels=N since=DATE expires=DATE.

    Raises ValueError.
    """
    rules: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition('=')
        if key == 'names' and value:
            rules[key] = value.lower().split(',')
        elif key == 'ports':
            rules[key] = port_range(value)
        elif key == 'tunnels' and re.fullmatch('[0-9]{1,9}', value):
            rules[key] = int(value)
        elif key in ('since', 'expires') and DATE.fullmatch(value):
            rules[key] = datetime.datetime.fromisoformat(value).timestamp()
        else:       # the word itself is not repeated: it may be part of a secret
            raise ValueError('after USER TOKEN only names=GLOB,... ports=A-B tunnels=N '
                             'expires=2027-01-31 may follow')
    return Grant(user, digest, **rules)


HASHED = 'sha256:'              # before a token of which only the hash is kept


def parse_grant(line: str) -> Grant | None:
    """Return what a LINE of a token file allows; None if it is empty.  Raises ValueError."""
    words = line.split('#')[0].split()
    if not words:
        return None
    if len(words) < 2 or '=' in words[0]:
        raise ValueError('it must be: USER TOKEN [names=...] [ports=...] [tunnels=...] '
                         '[expires=...]')
    hashed = words[1].startswith(HASHED)
    digest = words[1][len(HASHED):] if hashed else digest_of(check_token(words[1]))
    if not re.fullmatch('[0-9a-f]{64}', digest):
        raise ValueError(f'after {HASHED} 64 hexadecimal digits must follow')
    return make_grant(words[0], digest, words[2:])


def grants_in(path: str) -> Iterator[tuple[bytes, Grant | None]]:
    """The lines of the token file at PATH, and what they allow.  Raises OSError and ValueError."""
    for number, line in enumerate(whole_lines(path), 1):
        try:
            yield line, parse_grant(line.decode('utf-8-sig'))
        except (ValueError, UsageError, OverflowError) as e:
            raise ValueError(f'line {number}: {e}') from e


class TokenFiles(Source):
    """The token files of a server, whose tokens count beside those that it was given."""
    what = 'tokens'

    def __init__(self, tokens: Tokens, path: str, members: str = '') -> None:
        """The file at PATH must be there, the one at MEMBERS may.  Raises UsageError."""
        self.paths, self._members = [p for p in (path, members) if p], members
        self._tokens, self._given = tokens, tokens.grants
        error = self.reload()
        if error:
            raise UsageError(error)

    def reload(self) -> str | None:
        grants = list(self._given)
        self._stamps = [stamp_of(path) for path in self.paths]
        for path in self.paths:
            try:
                if path != self._members:
                    os.stat(path)       # it must be there
                grants += [grant for _, grant in grants_in(path) if grant]
            except FileNotFoundError:
                return f'there is no token file {path}; make an empty one, and invite fills it'
            except (OSError, ValueError) as e:
                return f"can't use the token file {path}: {plainly(e)}"
        self._tokens.take(grants)
        return None

    def changed(self) -> bool:
        return [stamp_of(path) for path in self.paths] != self._stamps


class Revoker:
    """Ends the tunnels of SERVER whose token is no longer valid."""

    def __init__(self, server: Server) -> None:
        self._tokens, self._tunnels = server.admission.tokens, server.tunnels
        self._grants = self._tokens.grants      # when all tunnels were looked at last
        self._look_at = 0.0                     # when they are again, since tokens may expire
        server.runtime.swept.add(self)

    def sweep(self, now: float, woke_up: bool) -> None:
        """Now and then, unless tokens have changed: there may be thousands of tunnels."""
        if now < self._look_at and self._grants is self._tokens.grants:
            return
        self._look_at, self._grants = now + 4 * SWEEP, self._tokens.grants
        for tunnel in self._tunnels:
            for member in tuple(tunnel.members):
                if not self._tokens.holds('', member.grant.digest, time.time()):
                    self._tunnels.revoke(tunnel, member,
                                         'the token of this tunnel is no longer valid; ask the '
                                         "operator of the server for a new code, for --join")


# ------------------------------------------------------------------------------------------------
# 50. Invitations
#
# Who may use a private server: lines of a token file, with hashes, which are added and taken out on
# the server's machine.  For that a server writes into its state folder where it is reached and
# which files it reads, and now and then whom it saw.
# ------------------------------------------------------------------------------------------------

SEEN = 'seen.json'              # {digest of a token: Unix seconds}
SEEN_EVERY = 15.0               # between its changes: a crash loses no more
READ_AGAIN = 2 * SWEEP          # a server that runs has seen by then that a file has changed
USER = re.compile('[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}')
SHOWN_DIGITS = 8                # of a token's hash: enough to tell those of one server apart


class Invited(Served):
    """Those who have tokens of the server that runs, or ran, with a state folder."""

    def __iter__(self) -> Iterator[tuple[str, bytes, Grant]]:
        """(file, line, what it allows) of all tokens.  Raises OSError and UsageError."""
        for path in self.files:
            try:
                yield from [(path, line, grant) for line, grant in grants_in(path) if grant]
            except ValueError as e:     # no server reads a file with a mistake
                raise UsageError(f"can't use {path}, nor can a server: {e}") from e

    def add(self, user: str, rules: Sequence[str]) -> str:
        """Give USER one more token, which allows what RULES say; return its code."""
        if not USER.fullmatch(user):
            raise UsageError(f'a user has a name of letters, digits and . _ @ + -, not {user!r}')
        token = secrets.token_hex(16)
        new = f'{user} {HASHED}{digest_of(token)} since={datetime.date.today()} {" ".join(rules)}'
        if re.search('[^\x20-\x7e]|#', new):
            raise UsageError('a rule is of printable ASCII characters, without #')
        try:
            grant = parse_grant(new)
        except ValueError as e:
            raise UsageError(str(e).replace('after USER TOKEN', 'after USER')) from e
        if grant and grant.expires <= time.time():
            raise UsageError('this code would have expired already; give expires= a day to come')
        list(self)
        rewrite(self.files[0], (), new.strip().encode() + b'\n')
        return make_code(self.address, token, self.pin)

    @staticmethod
    def remove(gone: Sequence[tuple[str, bytes, Grant]]) -> None:
        """Take those out that are to be GONE."""
        for path in {path for path, _, _ in gone}:
            rewrite(path, {line for file, line, _ in gone if file == path})


def table_of(invited: Invited, seen: dict[str, float]) -> Iterator[str]:
    """Return a line for each token of INVITED: whose, since when, when it was seen, its rules."""
    def day(seconds: float, form: str) -> str:
        return time.strftime(form, time.localtime(seconds)) if seconds else '-'
    yield f'{"USER":20} {"TOKEN":8}  {"SINCE":10}  {"LAST SEEN":16}  RULES'
    for _, line, grant in invited:
        rules = [word for word in line.decode('utf-8-sig').split('#')[0].split()[2:]
                 if not word.startswith('since=')]
        yield (f'{printable(grant.user):20} {grant.digest[:SHOWN_DIGITS]}  '
               f'{day(grant.since, "%Y-%m-%d"):10}  '
               f'{day(seen.get(grant.digest, 0), "%Y-%m-%d %H:%M"):16}  '
               + printable(' '.join(rules))).rstrip()


def read_seen(folder: str) -> dict[str, float]:
    """Return when the server of FOLDER saw which token; a file that is damaged says nothing."""
    try:
        with open(os.path.join(folder, SEEN), encoding='ascii') as f:
            return {str(digest): float(seconds) for digest, seconds in json.load(f).items()
                    if time.localtime(seconds)}     # which raises where it is none
    except (OSError, ValueError, TypeError, AttributeError, OverflowError):
        return {}


def invite_command(folder: str) -> str:
    """Return what the operator of the server with the state FOLDER types."""
    import shlex
    words = ['sudo'] if os.environ.get('SUDO_USER') else []     # whose state folder is another one
    words += ['python3', 'localtunnel.py', 'invite']
    if folder != user_folder('XDG_STATE_HOME', '~/.local/state'):
        words += ['--state', os.path.abspath(folder)]
    return ' '.join(shlex.quote(word) for word in (*words, 'USER'))


INVITE_EPILOG = """rules, after USER:
  names=GLOB,...   ports=A-B   tunnels=N   expires=DATE

examples:
  localtunnel.py invite ana                        prints what ana types
  localtunnel.py invite ana names=ana-* tunnels=3  the same, with limits
  localtunnel.py invite --list                     who, since when, last seen
  localtunnel.py invite --revoke ana               ends ana's tunnels, too"""


class Invitations(Annex):
    """Token files, and `invite`: what a server reads and writes for it."""
    title = 'users and their tokens'
    _files: TokenFiles          # of the server that runs

    def server_options(self, add: Add) -> None:
        add('--token-file', metavar='FILE', help='file of tokens, one per line (see below)')

    def commands(self, add: Callable[..., argparse.ArgumentParser]) -> None:
        parser = add('invite', help='let someone use your server', epilog=INVITE_EPILOG,
                     usage='%(prog)s [--state DIR] '
                           '(USER [RULE ...] | --list | --revoke USER|TOKEN)')
        parser.add_argument('--state', metavar='DIR', help="the server's state folder")
        one = parser.add_mutually_exclusive_group(required=True)
        one.add_argument('user', metavar='USER', nargs='?', help='make one more token for USER')
        one.add_argument('--list', action='store_true', help='show who has a token')
        one.add_argument('--revoke', metavar='USER|TOKEN',
                         help='take all tokens of USER away, or that TOKEN of the list')
        parser.add_argument('rules', metavar='RULE', nargs='*', help='what it allows (see below)')
        parser.set_defaults(run=self.invite)

    def invite(self, args: Args) -> int:
        """Do what ARGS say."""
        if args.user in ('list', 'revoke'):     # typed by habit
            raise UsageError(f'{args.user} is not a user; did you mean: python3 localtunnel.py '
                             + ' '.join(['invite', f'--{args.user}', *args.rules]))
        folder = state_folder(args.state)
        invited = Invited(folder)
        try:
            print_line('\n'.join(table_of(invited, read_seen(folder))) if args.list else
                       self.revoke(invited, args.revoke) if args.revoke else
                       self.welcome(invited, args.user, args.rules))
        except OSError as e:
            raise LocaltunnelError(f"can't use {e.filename or folder}: {e.strerror}") from e
        return 0

    @staticmethod
    def revoke(invited: Invited, who: str) -> str:
        """Take the tokens of the user WHO away, or the one of this name; return what to say."""
        tokens = list(invited)
        gone = ([token for token in tokens if token[2].user == who]
                or [token for token in tokens if token[2].digest[:SHOWN_DIGITS] == who])
        if not gone:
            raise LocaltunnelError(f'{who!r} has no token; see invite --list')
        invited.remove(gone)
        user = gone[0][2].user
        left = sum(grant.user == user for _, _, grant in tokens) - len(gone)
        return (f'{user} has {left or "no"} token{"s" * (left > 1)} '
                f'{"left" if left else "any more"} ({left + len(gone)} before); tunnels of what is '
                'gone end within seconds')

    @staticmethod
    def welcome(invited: Invited, user: str, rules: Sequence[str]) -> str:
        """Give USER one more token; return what to say."""
        address = invited.address
        if invited.open:
            raise LocaltunnelError(f'{address} lets anyone in, so this is enough: python3 '
                                   f'localtunnel.py client 8000 --server {address}')
        again = any(grant.user == user for _, _, grant in invited)
        join = f'client 8000 --join {invited.add(user, rules)}'
        time.sleep(READ_AGAIN)      # what is said works when it is said
        lines = [f'{user} is a member already; this is one more token, for another machine'] * again
        lines += [f'{user} types this, with the port of an app (the code is a secret):',
                  f'  python3 localtunnel.py {join}']
        if address.scheme == 'https' and not invited.pin:
            lines += ['or this, without a file:',
                      f'  curl -fsSL {address}/localtunnel.py | python3 - {join}']
        else:
            lines += ['Give them localtunnel.py, too: without a certificate of an authority nobody '
                      'can tell that what the server hands out was not changed on the way.']
        return '\n'.join(lines)

    def at_any_server(self, server: Server) -> None:
        if not server.admission.tokens.open:
            Revoker(server)

    async def at_server(self, args: Args, server: Server) -> None:
        tokens = server.admission.tokens
        members = '' if tokens.open else os.path.join(args.state, MEMBERS)
        self._files = TokenFiles(tokens, args.token_file or '', members)
        args.sources.all.append(self._files)

    async def run(self, args: Args, server: Server) -> None:
        """Write what `invite` needs, and go on writing who was seen."""
        tokens, (address, pin) = server.admission.tokens, args.entrance
        seen = read_seen(args.state)
        try:
            served = {'address': address, 'pin': pin, 'open': tokens.open,
                      'files': [os.path.abspath(path) for path in self._files.paths]}
            write_secret(os.path.join(args.state, SERVED), json.dumps(served).encode())
            if not tokens.open:
                server.log.note('to invite others: ' + invite_command(args.state))
            while True:
                await asyncio.sleep(SEEN_EVERY)
                await self.note_seen(args.state, server, seen)
        except OSError as e:
            server.log.note(f"warning: can't write into {args.state} ({e.strerror}), so `invite` "
                            'knows no more from now on')
        await super().run(args, server)

    @staticmethod
    async def note_seen(folder: str, server: Server, seen: dict[str, float]) -> None:
        """Add to SEEN who was here since the last time, and write it if that is anyone."""
        tokens, now = server.admission.tokens, time.time()
        new = dict(tokens.seen)
        tokens.seen.clear()
        for member in server.tunnels.members():
            if member.session.connection:
                new[member.grant.digest] = now
        new.pop('', None)           # of an open server
        if new:
            seen.update(new)
            for digest in [digest for digest in seen if not tokens.holds('', digest, 0)]:
                del seen[digest]
            await Disk().do(write_secret, os.path.join(folder, SEEN), json.dumps(seen).encode())


# ------------------------------------------------------------------------------------------------
# 51. Exchanges
#
# What has passed at a client, kept for a while.  Its taps and its observer stand on the path of
# each request, so they hold on to what is there anyway; all else is made when somebody asks.
# One annex with the three rooms below.
#
# An exchange has two forms: Kept, and a dict (Kept.details) that the API and record files share.
# In the dict secrets are masked, unless asked otherwise; filters, HAR and replay work on it.
# ------------------------------------------------------------------------------------------------

KEPT_EXCHANGES = 500
KEPT_RATE, KEPT_BURST = 500.0, 1000.0       # a second, where nobody waits for each; at once
KEPT_BYTES = 64 * MIB           # of all of them
KEPT_REQUEST = 1 * MIB          # of a request's body: a replay needs it whole
KEPT_RESPONSE = 64 * KIB        # of a response's body: enough to see what it is
KEPT_OBJECTS = 4 * KIB          # of an exchange beside its request and the bodies
KEPT_MESSAGES, KEPT_MESSAGE = 20, 1 * KIB       # of a WebSocket or an event stream, and of each
MAX_DEFLATED, MAX_INFLATED = 64 * KIB, 1 * MIB  # of a compressed message that is read
MAX_FRAMES = 512                # in one piece: reading tiny ones must not become a burden
PACE_SECONDS = 300              # for which the pace is known, second by second
PACE_NOW = 5                    # seconds of which the mean is the pace now

MASK = '***'
SECRET_FIELDS = {'authorization', 'proxy-authorization', 'cookie', 'set-cookie'}
# Names of query parameters: words that people glue to others, and short ones that stand alone.
_SECRET_NAME = re.compile(r'(?i:token|secret|passw|signature|credential|api_?-?key)'
                          r'|(?<![A-Za-z])(?i:key|sig|auth|pwd|jwt)(?![a-z])|(?:Key|Sig)(?![a-z])')
_PARAMETER = re.compile(r'(?<=[?&;#])([^?=&;#\s"\'<>]+)=([^&;#\s"\'<>]+)')


def masked(text: str) -> str:
    """Return TEXT with the parameters of its URLs masked whose names say that they are secret."""
    def hide(match: re.Match[str]) -> str:
        secret = _SECRET_NAME.search(urllib.parse.unquote(match.group(1)))
        return f'{match.group(1)}={MASK}' if secret else match.group()
    return _PARAMETER.sub(hide, text) if '=' in text else text


def hidden(name: str, value: str) -> str:
    """Return VALUE of the field NAME as it is shown."""
    return MASK if name.lower() in SECRET_FIELDS else masked(value)


def fields_of(block: bytes, show: bool) -> list[list[str]]:
    """Return the header lines of BLOCK as [name, value]; secrets are masked, or SHOWn."""
    found = re.findall(r'([^:]*):[ \t]*(.*?)[ \t]*\r\n', block.decode('latin-1'))
    return [[name, value if show else hidden(name, value)] for name, value in found]


def text_of(body: bytes, whole: bool) -> tuple[str, str]:
    """Return (text, encoding) of BODY: utf-8 if it is text, until it was cut; else base64."""
    with contextlib.suppress(UnicodeDecodeError):
        if b'\0' not in body:
            return codecs.getincrementaldecoder('utf-8')().decode(body, whole), 'utf-8'
    return base64.b64encode(body).decode(), 'base64'


def body_of(side: dict[str, Any]) -> bytes:
    """Return the bytes that text_of made text and encoding of, which SIDE has.  Raises BadHttp."""
    try:
        if side['encoding'] == 'base64':
            return base64.b64decode(side['body'], validate=True)
        if side['encoding'] == 'utf-8':
            return bytes(side['body'].encode())
    except ValueError as e:
        raise BadHttp(400, f'the body is not {side["encoding"]}') from e
    raise BadHttp(400, 'encoding takes utf-8 or base64')


# The messages inside a WebSocket, or a stream of events.

class Reader:
    """Sees what passes one way.  This one counts bytes; its heirs find messages, and keep some.

    It reads what strangers send, on the path of the tunnel: nothing makes it fail.
    """

    def __init__(self, kept: Kept, sender: str) -> None:
        self.kept, self.sender = kept, sender
        self.size = self.count = 0      # bytes, and messages, so far

    def feed(self, data: bytes) -> None:
        """Read DATA; this is a tap."""
        self.size += len(data)

    @property
    def full(self) -> bool:
        """True if no more messages are kept."""
        return len(self.kept.messages) >= KEPT_MESSAGES

    def keep(self, kind: str, payload: bytes, size: int) -> None:
        """Count a message of SIZE bytes, and keep PAYLOAD if it is among the first."""
        self.count += 1
        if not self.full:
            shown = payload[:KEPT_MESSAGE]
            text = shown.hex(' ') if kind == 'binary' else shown.decode('utf-8', 'replace')
            seconds = time.monotonic() - self.kept.record.began
            self.kept.messages = [*self.kept.messages, {
                'from': self.sender, 'kind': kind, 'text': text, 'size': size,
                'truncated': len(payload) > KEPT_MESSAGE, 'ms': round(seconds * 1e3, 1)}]
            self.kept.hold(len(text) + KIB)
            self.kept.watched.book.tell(self.kept)


class Events(Reader):
    """Reads server-sent events."""
    END = re.compile(rb'\r\n\r\n|\n\n|\r\r')
    _rest = b''                 # of an event that is not yet complete

    def feed(self, data: bytes) -> None:
        *events, rest = self.END.split(self._rest + data)
        for event in events:
            if event:
                self.keep('event', event, len(event))
        if len(rest) > 2 * KEPT_MESSAGE:        # its beginning is shown; its end may end it
            rest = rest[:KEPT_MESSAGE + 1] + rest[-3:]
        self._rest = rest


class Frames(Reader):
    """Reads WebSocket messages (RFC 6455), with permessage-deflate (RFC 7692)."""
    KINDS = {1: 'text', 2: 'binary', 8: 'close', 9: 'ping', 10: 'pong'}

    def __init__(self, kept: Kept, sender: str, deflated: bool) -> None:
        super().__init__(kept, sender)
        self._data, self._at = b'', 0       # a piece, and how far it is read
        self._frames = MAX_FRAMES           # that may still come in it
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS) if deflated else None
        self._reading = self._read()        # stands where it waits for more

    def feed(self, data: bytes) -> None:
        super().feed(data)
        self._data, self._at, self._frames = data, 0, MAX_FRAMES
        next(self._reading, None)

    def _take(self, n: int, most: int = 8) -> Generator[None, None, bytes]:
        """Wait for N bytes; return the first MOST of them."""
        taken = bytearray()
        while True:
            here = min(n, len(self._data) - self._at)
            taken += self._data[self._at:self._at + min(here, most - len(taken))]
            self._at += here
            n -= here
            if not n:
                return bytes(taken)
            yield

    def _read(self) -> Generator[None, None, None]:
        """Read frames as if all were here; ends where there are too many at once."""
        message, opening, size = bytearray(), 0, 0      # its first byte; as it came, in bytes
        while self._frames:
            self._frames -= 1
            first, second = yield from self._take(2)
            length, mask = second & 127, bytes(4)
            if length > 125:
                length = int.from_bytes((yield from self._take(2 if length == 126 else 8)), 'big')
            if second & 128:            # it is from a visitor
                mask = yield from self._take(4)
            payload = yield from self._take(length, 0 if self.full else MAX_DEFLATED)
            n = len(payload)
            key = int.from_bytes((mask * (n // 4 + 1))[:n], 'big')
            payload = (int.from_bytes(payload, 'big') ^ key).to_bytes(n, 'big')
            code = first & 15
            if code >= 8:               # it may come between the frames of a message
                if code == 8 and n >= 2:
                    payload = b'%d %b' % (int.from_bytes(payload[:2], 'big'), payload[2:])
                self.keep(self.KINDS.get(code, 'control'), payload, length)
                continue
            if code:
                message, opening, size = bytearray(), first, 0
            message += payload[:max(0, MAX_DEFLATED - len(message))]
            size += length
            if first & 128:             # the last one
                whole = self._inflated(message, size) if opening & 64 else bytes(message)
                self.keep(self.KINDS.get(opening & 15, 'binary'), whole, size)

    def _inflated(self, message: bytearray, size: int) -> bytes:
        """Return MESSAGE inflated, as long as all before it were: they share a dictionary."""
        inflater, self._inflater = self._inflater, None
        if inflater is not None and len(message) == size:
            with contextlib.suppress(zlib.error):
                text = inflater.decompress(message + b'\0\0\xff\xff', MAX_INFLATED)
                if not inflater.unconsumed_tail and not inflater.eof:
                    self._inflater = inflater
                return text
        return b'(compressed)'


# One exchange.

class Replay(ByteStream):
    """A stream with one request that was sent before; nobody reads the response."""
    on_lost: Callable[[], None] | None = None

    def __init__(self, runtime: Runtime, message: bytes) -> None:
        """MESSAGE is the whole request."""
        super().__init__(runtime)
        self.feed_data(message)
        self.feed_eof()

    async def write(self, data: Buffer, end: bool = False) -> None:
        self.check()

    def reset(self, code: int, text: str) -> None:
        self.set_exception(StreamReset(code, text))
        if self.on_lost:
            self.on_lost()

    def close(self) -> None:
        """Nothing has to be given back."""


def failed_hop(record: Record) -> str:
    """Return which hop failed RECORD, which did not go well; '' if the visitor left."""
    if not isinstance(record, Exchange):
        return 'app' if record.method == 'TCP' else 'relay'
    code = getattr(record.near.error, 'code', FAILED)
    if code in (DONE, FAILED):      # so its stream was ended here
        return 'client' if record.status == 400 else 'app'
    return '' if code == CANCELLED else 'relay'


# By the field with the signature: whose it is, and how many minutes it is accepted, by default.
SIGNATURES = {'stripe-signature': ('Stripe', 5), 'x-slack-signature': ('Slack', 5),
              'x-hub-signature-256': ('GitHub', 0), 'x-twilio-signature': ('Twilio', 0),
              'x-shopify-hmac-sha256': ('Shopify', 0)}


def about_signature(headers: Iterable[Sequence[str]], edited: bool, now: float) -> str:
    """Return a sentence on whether a provider's signature survives a replay, or ''."""
    fields = {name.lower(): value for name, value in headers}
    for field in SIGNATURES.keys() & fields.keys():
        provider, minutes = SIGNATURES[field]
        if edited:
            return f'edited after {provider} had signed it, so a check of the signature refuses it'
        if not minutes:
            return (f"{provider}'s signature has no age: a replay is accepted as it was, "
                    'but not edited')
        signed = re.search(r'(?:^|[, ])t=([0-9]{1,12})(?:,|$)', fields[field]) or re.match(
            '([0-9]{1,12})$', fields.get('x-slack-request-timestamp', ''))
        left = 60 * minutes - (now - int(signed.group(1))) if signed else 0
        if left <= 0:
            return (f"{provider}'s signature is older than {minutes} minutes, so a replay is "
                    'refused unless your code allows more')
        return (f"{provider}'s signature is accepted for {round(left)} s more, if the replay is "
                'not edited')
    return ''


class Kept:
    """One exchange: the record that the tunnel keeps anyway, and what passed.

    An attribute of the class is so until it is set: most never are.
    """
    sent: bytes | bytearray = b''       # of the bodies, where they came piece by piece
    received = b''                      # most are one piece, which this need not copy
    readers: Sequence[Reader] = ()      # of both ways, after an upgrade and in an event stream
    messages: Sequence[dict[str, Any]] = ()
    edited = False                      # it is a replay, and not as it was
    seconds: float | None = None        # that it took, once it has ended
    failed = ''                         # which hop did: app, client, relay

    def __init__(self, watched: Watched, record: Record, seconds: float) -> None:
        """It has run for SECONDS."""
        self.watched, self.record, self.number = watched, record, record.number
        self.held = KEPT_OBJECTS        # bytes of memory; 0 once it is no longer in the book
        self.at = time.time() - seconds

    def hold(self, size: int) -> None:
        """Count SIZE bytes of memory."""
        if self.held:
            self.held += size
            book = self.watched.book
            book.used += size
            if book.used > KEPT_BYTES:
                book.shrink()

    def sends(self, piece: bytes) -> None:
        """Keep a PIECE of the request's body, or see what comes after an upgrade; this is a tap."""
        if self.readers:
            return self.readers[0].feed(piece)
        room = self.watched.book.most - len(self.sent)
        if room > 0 and self.held:
            if not self.sent:
                self.sent = bytearray()
            self.sent += piece[:room]
            self.hold(min(room, len(piece)))

    def receives(self, piece: bytes) -> None:
        """Keep a PIECE of the response's body; this is a tap."""
        if self.readers:
            self.readers[1].feed(piece)
        room = KEPT_RESPONSE - len(self.received)
        if room > 0 and self.held:
            self.received += piece[:room]
            self.hold(min(room, len(piece)))

    def end(self, seconds: float) -> None:
        """It has ended, after SECONDS: let go of its streams, which hold much more."""
        record, nowhere = self.record, self.watched.book.nowhere
        self.seconds = seconds
        if record.why:
            self.failed = failed_hop(record)
        if isinstance(record, Exchange):
            record.near = record.far = nowhere
            response, size = record.response, 2 * len(record.request.block)
            if response:
                size += 2 * len(response.block)
            for body in record.body, record.answer:
                if isinstance(body, WholeBody):
                    size += body.taken
                elif isinstance(body, Body):
                    body.stream = nowhere
            self.hold(size)

    @property
    def kind(self) -> str:
        """http, websocket or tcp."""
        if isinstance(self.record, Exchange):
            return 'websocket' if b'websocket' in self.record.request.upgrade.lower() else 'http'
        return 'tcp' if self.record.method == 'TCP' else 'http'

    def summary(self, show: bool = False) -> dict[str, Any]:
        """Return what a list shows of it, with secrets if they are to be SHOWn."""
        record, visitor, origin = self.record, self.record.visitor, b''
        if isinstance(record, Exchange):
            visitor = record.request.get(b'x-forwarded-for').decode('latin-1').partition(',')[0]
            origin = record.request.fields.get(b'localtunnel-replay', b'')
        seconds = time.monotonic() - record.began if self.seconds is None else self.seconds
        upgraded = record.status == 101
        return {
            'id': record.number, 'tunnel': self.watched.name, 'kind': self.kind,
            'at': rfc3339(self.at), 'visitor': visitor,
            'method': record.method, 'target': record.target if show else masked(record.target),
            'status': record.status, 'ms': round(seconds * 1e3, 1),
            'request_bytes': self.readers[0].size if upgraded else record.sent,
            'response_bytes': record.size, 'error': record.why, 'failed': self.failed,
            'replay_of': int(origin) if origin.isdigit() and len(origin) < 16 else None,
            'pending': self.seconds is None}

    def details(self, show: bool = False) -> dict[str, Any]:
        """Return all that is known of it, with secrets if they are to be SHOWn."""
        record, summary = self.record, self.summary(show)
        details = {**summary, 'request': None, 'response': None, 'timing': {
            'first_byte_ms': None, 'end_ms': None if summary['pending'] else summary['ms']}}
        if not isinstance(record, Exchange):
            return details
        response = record.response

        def side(line: str, head: Head, body: Any, kept: bytes) -> dict[str, Any]:
            whole = isinstance(body, Body) and body.finished and body.taken == len(kept)
            whole = whole or response is not None and response.status == 101
            text, encoding = text_of(kept, whole)
            return {'line': line, 'headers': fields_of(head.block, show), 'body': text,
                    'trailers': fields_of(getattr(body, 'trailers', b''), show),
                    'encoding': encoding, 'truncated': not whole}
        details['request'] = request = side(
            f'{record.method} {summary["target"]} HTTP/1.1', record.request, record.body,
            bytes(self.sent) if record.body.whole is None else record.body.whole)
        details['edited'] = self.edited
        details['signature'] = about_signature(request['headers'], self.edited, time.time())
        if response is not None:
            line = f'HTTP/1.1 {response.status}{response.reason.decode("latin-1")}'
            details['response'] = side(line, response, record.answer,
                                       getattr(record.answer, 'whole', None) or self.received)
            if record.answered:
                first = round((record.answered - record.began) * 1e3, 1)
                details['timing']['first_byte_ms'] = first
        if any(type(reader) is not Reader for reader in self.readers):
            details['messages'] = [*self.messages]
            details['message_counts'] = [reader.count for reader in self.readers]
        return details

    def as_object(self) -> types.SimpleNamespace:
        """Return it as an object, whose attributes have the names of the API."""
        return types.SimpleNamespace(**self.details())


# All of them.

class Watched(ClientObserver):
    """An app of whose exchanges BOOK keeps the latest, and the tunnel that leads to it."""

    def __init__(self, book: Exchanges, app: App, server: str, name: str) -> None:
        """NAME tells its tunnel, which goes to SERVER, from others of this process."""
        self.book, self.app, self.server, self.name = book, app, server, name
        self.url = ''               # once it is there
        book.tunnels = [*(one for one in book.tunnels if not one.app.closed), self]
        app.seen, app.watching = book, book.listeners
        app.request_taps.append(self.begun)
        app.response_taps.append(self.responded)
        observers: Any = Observers(app.observer, self)
        app.observer = observers

    def ready(self, url: str, user: str, round_trip: float) -> None:
        self.url = url

    def begun(self, exchange: Exchange) -> Tap | None:
        """Return what keeps the body of the request; most are kept once they have ended."""
        book = self.book
        kept = book.open[exchange] = book.keep(self, exchange, 0.0)
        if kept is None:
            return None
        book.tell(kept)
        return kept.sends

    def responded(self, exchange: Exchange) -> Tap | None:
        """Return what keeps the body of the response, which comes piece by piece."""
        book, response = self.book, exchange.response
        assert response is not None
        if exchange not in book.open:
            book.open[exchange] = book.keep(self, exchange, exchange.answered - exchange.began)
        kept = book.open[exchange]
        if kept is None:
            return None
        if response.status == 101:
            deflated = b'permessage-deflate' in response.block
            kept.readers = [Frames(kept, sender, deflated) if kept.kind == 'websocket' else
                            Reader(kept, sender) for sender in ('visitor', 'app')]
        elif b'content-length' not in response.fields and response.find(
                b'content-type').lower().startswith('text/event-stream'):
            kept.readers = Reader(kept, 'visitor'), Events(kept, 'app')
        book.tell(kept)
        return kept.readers[1].feed if response.status == 101 else kept.receives

    def exchange(self, exchange: Record, seconds: float) -> None:
        book = self.book
        book.took.append(seconds)
        if exchange.why or exchange.status >= 500:
            book.errors += 1
        if exchange in book.open:
            kept = book.open.pop(exchange)
        else:
            kept = book.keep(self, exchange, seconds)
        if kept is None:
            return
        kept.end(seconds)
        if book.listeners:
            book.tell(kept)

    def about(self) -> dict[str, str]:
        """Return what the API says of it."""
        return {'name': self.name, 'url': self.url, 'target': self.app.target.text,
                'server': self.server}


class Exchanges:
    """Keeps what passes, the latest of it; for people in Python it is a sequence."""

    def __init__(self, runtime: Runtime, most: int) -> None:
        """MOST bytes are kept of a request's body."""
        self.runtime, self.most = runtime, most
        self.tunnels: list[Watched] = []
        self.kept: collections.deque[Kept] = collections.deque()        # as they came here
        # Those that run, where they are kept already; None: they are only counted.
        self.open: dict[Record, Kept | None] = {}
        self._room = KEPT_BURST     # for how many there is, until others are only counted
        self.seen = self.used = 0               # exchanges so far; bytes of memory for those kept
        # By second: [Unix time, requests, errors, median, slowest]; and the one that runs.
        self.pace: collections.deque[list[float]] = collections.deque(maxlen=PACE_SECONDS)
        self._second = self.errors = 0
        self.took: list[float] = []
        self.nowhere = ByteStream(runtime)      # where the streams were of those that ended
        # A seam.  They are told of an exchange that has begun, come further, or ended.
        self.listeners: list[Callable[[Kept], None]] = []
        runtime.swept.add(self)

    def tell(self, kept: Kept) -> None:
        """Tell the listeners of KEPT."""
        for listener in tuple(self.listeners):
            listener(kept)

    def sweep(self, now: float, woke_up: bool) -> None:
        """Make room for others, and close the second that is over; twice a second is enough."""
        self._room = min(KEPT_BURST, self._room + KEPT_RATE * SWEEP)
        second = int(time.time())
        if self.took and second != self._second:
            took = sorted(self.took)
            self.pace.append([self._second, len(took), self.errors,
                              round(took[len(took) // 2] * 1e3, 1), round(took[-1] * 1e3, 1)])
            self.errors, self.took = 0, []
        self._second = second

    # What is kept.

    def __len__(self) -> int:
        return len(self.all())

    def __getitem__(self, at: Any) -> Any:
        kept = self.all()[at]
        return [one.as_object() for one in kept] if isinstance(at, slice) else kept.as_object()

    def _running(self) -> list[tuple[Watched, Record]]:
        """Those that run, of which nothing is kept yet."""
        return [(one, record) for one in self.tunnels for record in tuple(one.app.under_way)
                if record not in self.open]

    def all(self) -> list[Kept]:
        """Return those that are kept, and those that run, the oldest first."""
        now = time.monotonic()
        return sorted([*self.kept, *(Kept(one, record, now - record.began)
                                     for one, record in self._running())],
                      key=operator.attrgetter('number'))

    def keep(self, watched: Watched, record: Record, seconds: float) -> Kept | None:
        """Keep what comes of RECORD, which has run for SECONDS; None where it is only counted."""
        self.seen += 1
        if not self.listeners:
            if self._room < 1:      # of thousands a second most would be gone at once
                return None
            self._room -= 1
        kept = Kept(watched, record, seconds)
        self.kept.append(kept)
        self.used += KEPT_OBJECTS
        if len(self.kept) > KEPT_EXCHANGES:
            self.shrink()
        return kept

    def forget(self) -> None:
        """Let go of all; those that run are not listed any more."""
        self.shrink(0)
        for _, record in self._running():
            self.seen += 1
            self.open[record] = None

    def shrink(self, most: int | None = None) -> None:
        """Let go of the oldest, until there is room, or no more than MOST are left."""
        most = KEPT_EXCHANGES if most is None else most
        while len(self.kept) > most or self.used > KEPT_BYTES:
            kept = self.kept.popleft()
            self.used -= kept.held
            kept.held = 0
            if kept.seconds is None:        # it runs: nothing more of it is kept
                kept.sent, kept.received = bytearray(), b''


# What is made of them: a choice, an archive, a request to send again.

# Words of a filter: how their values look, and an example of what they take.
WORDS = {'status': ('[0-9][0-9x]{2}', '404 or 5xx'), 'method': ('.*', ''), 'kind': ('.*', ''),
         'slow': ('>?[0-9]{1,9}([.][0-9]{1,9})?', '>MILLISECONDS, such as >500'),
         'failed': ('.*', ''), 'tunnel': ('.*', '')}


class Filter:
    """Words that must all fit an exchange: method:post, status:5xx, slow:>500, or any text."""

    def __init__(self, text: str) -> None:
        """Raises BadHttp."""
        self._words: list[tuple[str, str]] = []
        self.texts: list[str] = []
        for word in text.lower().split():
            name, colon, value = word.partition(':')
            if not colon or name not in WORDS:
                self.texts.append(word)
            elif re.fullmatch(WORDS[name][0], value):
                self._words.append((name, value))
            else:
                raise BadHttp(400, f'{name} takes {WORDS[name][1]}, not {value!r}')

    @staticmethod
    def _fits(exchange: dict[str, Any], name: str, value: str) -> bool:
        """Return True if the word NAME:VALUE fits EXCHANGE."""
        if name == 'status':
            return bool(re.fullmatch(value.replace('x', '.'), f'{exchange["status"]:03}'))
        if name == 'slow':
            return bool(exchange['ms'] > float(value.lstrip('>')))
        return bool(exchange.get(name, '').lower() == value)     # older records have no tunnel

    def fits(self, exchange: dict[str, Any], details: Callable[[], dict[str, Any]]) -> bool:
        """Return True if EXCHANGE fits; texts are looked for in its DETAILS."""
        if not all(self._fits(exchange, *word) for word in self._words):
            return False
        if not self.texts:
            return True
        exchange, parts = details(), [exchange['target']]
        for side in filter(None, (exchange['request'], exchange['response'])):
            parts += [': '.join(field) for field in side['headers'] + side['trailers']]
            parts += [side['body']] if side['encoding'] == 'utf-8' else []
        parts += [message['text'] for message in exchange.get('messages', ())]
        whole = '\n'.join(parts).lower()
        return all(text in whole for text in self.texts)


def har_entry(exchange: dict[str, Any]) -> dict[str, Any]:
    """Return EXCHANGE as HTTP Archive 1.2 has it."""
    request, response = exchange['request'], exchange['response'] or {
        'line': '', 'headers': [], 'body': '', 'encoding': 'utf-8'}
    asked, told = ({name.lower(): value for name, value in side['headers']}
                   for side in (request, response))
    wait = min(exchange['timing']['first_byte_ms'] or exchange['ms'], exchange['ms'])

    def pairs(fields: Iterable[Iterable[str]]) -> list[dict[str, str]]:
        return [dict(zip(('name', 'value'), field)) for field in fields]

    def content(side: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
        encoding = {'encoding': 'base64'} if side['encoding'] == 'base64' else {}
        return {'mimeType': fields.get('content-type', ''), 'text': side['body'], **encoding}
    both = {'httpVersion': 'HTTP/1.1', 'cookies': [], 'headersSize': -1}
    return {
        'startedDateTime': exchange['at'], 'time': exchange['ms'], 'cache': {},
        'request': {
            **both, 'method': exchange['method'], 'headers': pairs(request['headers']),
            'url': f'{asked.get("x-forwarded-proto", "http")}://{asked.get("host", "localhost")}'
                   + exchange['target'],
            'queryString': pairs(urllib.parse.parse_qsl(
                exchange['target'].partition('?')[2], keep_blank_values=True)),
            'bodySize': exchange['request_bytes'],
            **({'postData': content(request, asked)} if request['body'] else {})},
        'response': {
            **both, 'status': exchange['status'], 'statusText': response['line'][13:],
            'headers': pairs(response['headers']), 'redirectURL': told.get('location', ''),
            'bodySize': exchange['response_bytes'],
            'content': {'size': exchange['response_bytes'], **content(response, told)}},
        'timings': {'send': 0, 'wait': wait, 'receive': round(exchange['ms'] - wait, 1)},
        'comment': exchange['error']}


def har_pieces(exchanges: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Return EXCHANGES as an HTTP Archive, piece by piece."""
    yield ('{"log": {"version": "1.2", "creator": {"name": "localtunnel", "version": "%s"}, '
           '"entries": [' % __version__)
    comma = ''
    for exchange in exchanges:
        if exchange['request']:
            yield comma + json.dumps(har_entry(exchange))
            comma = ',\n'
    yield ']}}\n'


def not_replayable(exchange: dict[str, Any]) -> str:
    """Return why the request of EXCHANGE can't be sent again, or ''."""
    request = exchange['request']
    if not request:
        return 'there was no whole request, so there is nothing to replay'
    fields = {name.lower(): value for name, value in request['headers']}
    if 'upgrade' in fields:
        return "an upgrade, such as a WebSocket, can't be replayed"
    if not request['truncated']:
        return ''
    kept, size = len(body_of(request)), exchange['request_bytes']
    if size <= kept:
        return 'the body of its request did not come whole'
    if re.fullmatch('[0-9]{1,15}', fields.get('content-length', '')):
        # The app may have answered before all of it was here: this says how much to keep.
        size = int(fields['content-length'])
    return (f'only {kept} of the {size} bytes of its body were kept; start the client with '
            f'--inspect-body {-(-size // KIB)} to keep them all')


MOST_NUMBER = 1e15              # bytes and times are less; NaN and infinity are not


def fits(value: Any, shape: Any) -> bool:
    """Return True if JSON of a stranger, VALUE, has SHAPE.

    That is a type, a dict of shapes, a list of one shape for all members or of one for each, or a
    tuple of shapes of which one must do.
    """
    if isinstance(shape, tuple):
        return any(fits(value, one) for one in shape)
    if isinstance(shape, dict):
        return isinstance(value, dict) and shape.keys() <= value.keys() and all(
            fits(value[key], inside) for key, inside in shape.items())
    if isinstance(shape, list) and isinstance(value, list):
        shapes = shape if len(shape) > 1 else shape * len(value)
        return len(value) == len(shapes) and all(map(fits, value, shapes))
    return not isinstance(shape, list) and isinstance(value, shape) and (
        not isinstance(value, (int, float)) or abs(value) < MOST_NUMBER)


FIELDS = [[str, str]]           # a shape: [name, value], any number of them
EDITS = {'method': str, 'target': str, 'headers': FIELDS, 'trailers': FIELDS, 'body': str,
         'encoding': str, 'set_headers': FIELDS}
# They belong to the connection that they came on, or are made anew.
NOT_REPLAYED = {'connection', 'keep-alive', 'proxy-connection', 'te', 'upgrade',
                'transfer-encoding', 'expect', 'localtunnel-replay'}


class Edited:
    """The request of an exchange, perhaps edited, as it is to be sent again."""

    def __init__(self, exchange: dict[str, Any], edits: dict[str, Any]) -> None:
        """EXCHANGE shows its secrets where they are known; EDITS may mask them.  Raises BadHttp."""
        for name, value in edits.items():
            if name not in EDITS or not fits(value, EDITS[name]):
                raise BadHttp(400, f'a replay takes {", ".join(EDITS)}, not {name[:MAX_TEXT]!r} of '
                              'this kind; headers are a list of [name, value]')
        request = exchange['request']
        was = {**exchange, **request}
        now = {**was, **({'encoding': 'utf-8'} if 'body' in edits else {}), **edits}
        new = edits.get('set_headers', [])
        names = {name.lower() for name, _ in new}
        self.left_out: list[str] = []       # what is masked, and not known here
        self._secrets = {(name.lower(), hidden(name, value)): value
                         for name, value in request['headers'] + request['trailers']}
        self.method, self.body = now['method'], body_of(now)
        self.target = self._target(now['target'], was['target'])
        self.headers = self._known([field for field in now['headers']
                                    if field[0].lower() not in names]) + new
        self.trailers = self._known(now['trailers'])
        self._host = [field for field in request['headers'] if field[0].lower() == 'host']
        self.changed = (self.method, self.target, self.body) != (
            was['method'], was['target'], body_of(was))

    def _known(self, fields: list[list[str]]) -> list[list[str]]:
        """Return FIELDS with what their masks hide, or without those of which nothing is known."""
        known = [[name, self._secrets.get((name.lower(), value), value)] for name, value in fields]
        self.left_out += [name for name, value in known if MASK in value]
        return [[name, value] for name, value in known if MASK not in value]

    def _target(self, target: str, original: str) -> str:
        """Return TARGET with the parameters that it masks, as in ORIGINAL, or without them."""
        secrets = dict(_PARAMETER.findall(original))

        def known(match: re.Match[str]) -> str:
            name, value = match.groups()
            if value == MASK:
                value = secrets.get(name, MASK)
            if value != MASK:
                return f'{name}={value}'
            self.left_out.append(name)
            return ''
        shown = _PARAMETER.sub(known, target)
        return re.sub(r'([?&;])[&;]+|[?&;]+$', r'\1', shown) if self.left_out else shown

    def _fields(self) -> list[list[str]]:
        """Return the header fields; where the body ends is said anew."""
        names = {name.lower() for name, _ in self.headers}
        chunked, length = bool(self.trailers) or 'transfer-encoding' in names, str(len(self.body))
        dropped = NOT_REPLAYED | ({'content-length'} if chunked else set())
        fields = [[name, length if name.lower() == 'content-length' else value]
                  for name, value in self.headers if name.lower() not in dropped]
        if chunked:
            fields.append(['Transfer-Encoding', 'chunked'])
        elif 'content-length' not in names and (self.body or self.method in ('POST', 'PUT')):
            fields.append(['Content-Length', length])
        return fields if 'host' in names else self._host + fields

    def message(self, number: int) -> bytes:
        """Return it as bytes: a replay of exchange NUMBER.  Raises BadHttp if HTTP forbids it."""
        fields = [*self._fields(), ['Localtunnel-Replay', str(number)]]
        every = [[self.method, self.target], *fields, *self.trailers]
        if any(re.search('[\r\n]', ''.join(pair)) or ':' in pair[0] for pair in every):
            raise BadHttp(400, 'a line break where none may be, or a colon in the name of a field')
        line = [f'{self.method} {self.target} HTTP/1.1']
        try:
            head, last = ('\r\n'.join([*map(': '.join, part), '', '']).encode('latin-1')
                          for part in ([line, *fields], self.trailers))
        except UnicodeEncodeError as e:
            raise BadHttp(400, 'method, target and header fields take Latin-1 only') from e
        if not _FIELDS.fullmatch(last[:-2]) or NO_TRAILER.search(last):
            raise BadHttp(400, 'a trailer that HTTP does not allow')
        if parse_request(head).length != CHUNKED:
            return head + self.body
        size = b'%x\r\n%b\r\n' % (len(self.body), self.body) if self.body else b''
        return head + size + b'0\r\n' + last


# ------------------------------------------------------------------------------------------------
# 52. Inspector's page
#
# The page: it knows the API of the next room, and nothing else.  Its one script is all that may run
# there, by its hash; styles may stand anywhere, since the preview of a page has some.
# ------------------------------------------------------------------------------------------------

INSPECTOR_PAGE = r'''<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>localtunnel</title><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; color: var(--text); background: var(--page);
  font: clamp(14px, 12px + .15vw, 19px)/1.5 system-ui, sans-serif; --edge: 1px solid var(--line);
  --page: light-dark(#fff, #14171c); --panel: light-dark(#f5f6f8, #1b1f26);
  --line: light-dark(#dfe3e8, #2e353f); --text: light-dark(#1c2128, #e4e8ee);
  --dim: light-dark(#5a6370, #9ba5b3); --link: light-dark(#0a5bd0, #74b4ff);
  --good: light-dark(#11703a, #58c886); --warn: light-dark(#8f5400, #e5ac50);
  --bad: light-dark(#c0222b, #ff8080); --tint: light-dark(#e6effc, #1f2c40); }
* { box-sizing: border-box; margin: 0; scrollbar-width: thin; min-width: 0; }
body { height: 100dvh; display: grid; grid: auto minmax(0, 1fr) / 100%; }
h1, h2, h3 { font-size: 1rem; max-height: 9rem; overflow: auto; } i { font-style: normal; }
a, summary { color: var(--link); text-decoration: none; }
canvas { width: 11rem; image-rendering: pixelated; background: #fff; } .wide { flex: 1; }
:focus-visible { outline: 2px solid var(--link); outline-offset: -1px; }
[hidden], #toast:empty { display: none !important; } form, label { display: grid; gap: .4rem; }
button, input, textarea { font: inherit; color: var(--text); background: var(--page);
  border: 1px solid var(--line); border-radius: .4em; padding: .2em .7em; }
button { cursor: pointer; white-space: nowrap; } button:hover { border-color: var(--link); }
progress { width: 100%; accent-color: var(--link); }
.main, .main:hover { background: var(--link); border-color: var(--link); color: var(--page); }
pre, code, textarea, .mono, .tree, .row { font: .9rem/1.5 ui-monospace, Menlo, monospace; }
pre, td, .wrap, .tree { white-space: pre-wrap; overflow-wrap: anywhere; }
pre, td, .wrap { unicode-bidi: plaintext; } .tree :is(b, span) { unicode-bidi: isolate; }
.dim, td:first-child, label, ::placeholder { color: var(--dim); } .good { color: var(--good); }
.warn { color: var(--warn); } .bad { color: var(--bad); }
.bar { display: flex; flex-wrap: wrap; gap: .4rem .6rem; align-items: center; position: relative; }
.box { border: var(--edge); border-radius: .5em; padding: .6rem .9rem; }
header, nav > .bar { padding: .5rem 1rem; border-bottom: var(--edge); background: var(--panel); }
#state::before { content: "\25cf  "; } figure { display: flex; gap: 1rem; flex: 0 1 36rem; }
#plot { flex: 1; height: 3rem; border-bottom: var(--edge); stroke-width: 2; }
#plot path { vector-effect: non-scaling-stroke; } #slowest { stroke: var(--warn); }
#rate { fill: var(--link); opacity: .4; } #errors { fill: var(--bad); }
#median { stroke: var(--good); } #more { position: absolute; top: calc(100% + .4rem); left: 40%; }
#figures { display: grid; grid: auto auto / 8rem 8rem; align-content: center; font-size: .85rem; }
main { display: grid; grid: minmax(0, 1fr) / minmax(24rem, 2fr) minmax(0, 3fr); }
nav { display: grid; grid: auto minmax(0, 1fr) / 100%; border-right: var(--edge); }
#list { overflow: auto; list-style: none; padding: 0; }
.row { display: flex; flex-wrap: wrap; justify-content: end; gap: 0 .7em; padding: .3rem 1rem;
  border: solid transparent; border-width: 0 0 0 3px; color: inherit; text-align: right;
  box-shadow: 0 -1px var(--line) inset; }
.row > * { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; width: 5em; }
.row > :is(b, bdi, small) { text-align: left; } .row bdi { flex: 1 10em; } .row span { width: 3em; }
.row:hover { background: var(--panel); } .row:has(.bad) { border-color: var(--bad); }
.row[aria-current] { background: var(--tint); border-color: var(--link); }
.row small { width: 100%; padding-left: 6.85em; }
article { overflow: auto; padding: 1rem 1.5rem 4rem; display: grid; gap: .9rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 42rem), 1fr)); align-content: start; }
article > :not(section) { grid-column: 1 / -1; } img { max-width: 100%; background: #fff; }
section { display: grid; grid: auto / 100%; gap: .5rem; align-content: start; }
section .box { max-height: 75vh; overflow: auto; } .tree div div { padding-left: 1.2em; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
iframe { width: 100%; height: 60vh; }
td { padding: .1rem .8rem .1rem 0; vertical-align: top; } td:first-child { width: 30%; }
dialog { width: min(52rem, 94vw); border: var(--edge); border-radius: .7em; margin: auto;
  background: var(--page); color: inherit; }
#toast { position: fixed; bottom: 1rem; left: 50%; translate: -50%; max-width: 92vw; z-index: 2;
  background: var(--text); color: var(--page); padding: .5rem 1rem; border-radius: .5em; }
@media (width < 55rem) { figure { flex: 1 1 100%; } main { grid-template-columns: 100%; }
  .one nav, .many article { display: none; } .none main { grid-template-rows: auto 1fr; } }
</style>
<header class="bar"><h1 id="state" role="status"></h1><div class="bar wide">
    <a id="url" class="mono wrap" target="_blank" rel="noreferrer"></a>
    <button id="copy">Copy URL</button><span id="target" class="dim wrap"></span></div>
  <figure title="The last five minutes">
    <svg id="plot" viewBox="0 0 300 40" preserveAspectRatio="none" aria-hidden="true">
      <path id="rate"/><path id="errors"/><path id="slowest"/><path id="median"/></svg>
    <figcaption id="figures"></figcaption></figure></header>
<main><nav aria-label="Requests"><div class="bar">
      <input id="filter" type="search" class="wide" size="9" aria-label="Filter" spellcheck="false"
        placeholder="text  method:post  status:5xx  slow:&gt;500">
      <span id="count" class="dim" role="status"></span><a href="/api/har" download>HAR</a>
      <button id="clear">Clear</button><button id="more" class="main" hidden></button></div>
    <ol id="list"></ol></nav>
  <article tabindex="-1" aria-label="Details"></article></main>
<dialog id="edit" aria-label="Edit and replay"><form method="dialog">
  <div class="bar"><label>Method <input name="verb" size="9"></label>
    <label class="wide">Path <input name="path"></label></div>
  <label>Headers <textarea name="headers" rows="9" spellcheck="false"></textarea></label>
  <label>Body <textarea name="body" rows="9" spellcheck="false"></textarea></label>
  <label>Trailers <textarea name="trailers" rows="1" spellcheck="false"></textarea></label>
  <p class="bar"><button class="main" value="send">Replay</button><button>Cancel</button></p>
</form></dialog>
<dialog id="help" aria-label="Keys" closedby="any"></dialog><div id="toast" role="status"></div>
<script>
'use strict';
const KEPT = 500, MOST = 1000;  // exchanges in the list; lines or members that are laid out at once
const LONG = 1 << 16;           // characters of a text that is shown, and of markup that is parsed
const UNPACKED = 4 << 20;       // bytes that a compressed body may become, and
const DROP = 256;               // bytes of it at a time, of which a bomb makes a megabyte or a few
const NESTED = 4;               // multipart bodies inside one another
const $ = selector => document.querySelector(selector), json = JSON.stringify;

// What strangers sent gets into the page by `make` alone: as text, never as markup, and with what
// would be invisible, or turn its surroundings around, spelled out.
const shown = text => String(text).slice(0, LONG).replace(
  /[\0-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g,
  c => c === '\r' ? '' : `\\u${c.charCodeAt().toString(16).padStart(4, '0')}`)
  + (text?.length > LONG ? `\n\u2026 ${text.length - LONG} more characters` : '');
function make(spec, ...inside) {        // 'tag.class', and what it holds; objects are properties
  const [tag, ...classes] = spec.split('.'), node = document.createElement(tag);
  node.className = classes.join(' ');
  for (const one of inside.flat()) typeof one === 'object' && !(one instanceof Node)
    ? Object.assign(node, one) : node.append(one instanceof Node ? one : shown(one));
  return node;
}
const button = (text, onclick, spec = 'button') => make(spec, {onclick}, text);
const table = lines => make('table', lines.slice(0, MOST).map(
  cells => make('tr', cells.map(cell => make('td', cell)))));
const link = id => make('a', {href: `#${id}`}, `#${id}`);
const ms = n => n < 1000 ? `${Number(n.toPrecision(3))} ms` : `${(n / 1000).toPrecision(3)} s`;
const size = n => n.toLocaleString('en', {notation: 'compact', style: 'unit', unit: 'byte',
  unitDisplay: 'narrow', maximumFractionDigits: 1});
const tone = x => x.error || x.status >= 500 ? 'bad' : x.status >= 400 ? 'warn' : 'good';
const HOPS = {app: 'your app', client: 'the client', relay: 'the server', '': 'the visitor'};

async function call(path, method = 'GET', value) {
  const answer = await fetch(`/api/${path}`, {
    method, body: value && json(value), headers: {'Localtunnel-Inspector': '1'}});
  const result = await answer.json().catch(() => ({}));         // a 204 has none
  if (!answer.ok) throw Error(result.error);
  return result;
}
function say(text) {
  clearTimeout(say.timer);
  [$('#toast').textContent, say.timer] = [shown(text), setTimeout(say, 8000, '')];
}
const copy = (text, what) => navigator.clipboard.writeText(text).then(
  () => say(`${what} copied`), e => say(`This browser did not let it be copied: ${e.message}`));

// The list.  What arrives waits in `coming`, and enters unless that would move what one looks at.
const list = new Map(), coming = new Map();     // by id: lines; exchanges
let chosen = 0, open = null;            // the id in the address; what the API says of it
let due = 0, moved = -9999, kept = 0;   // the timer of `settle`; the pointer; what the client has
const held = () => chosen || $('#list').scrollTop > 0 || performance.now() - moved < 2000;

function put(x) {
  const line = make('li', {exchange: x}, make('a.row',
    {href: `#${x.id}`, title: shown(x.target), ariaCurrent: x.id === chosen || null},
    make('b', x.kind === 'websocket' ? 'WS' : x.method),
    make('bdi', {dir: 'ltr'}, make('i.dim', x.tunnel && `${x.tunnel} `), x.target),
    make(`span.${tone(x)}`, x.status || (x.pending ? '\u2026' : '\u2013')), make('i', ms(x.ms)),
    make('i', size(x.response_bytes)), make('i', new Date(x.at).toLocaleTimeString('en-GB')),
    x.error ? make('small.bad', `${HOPS[x.failed]}: ${x.error}`) : null));
  list.get(x.id)?.remove();
  list.set(x.id, line);
  const older = [...$('#list').children].find(one => one.exchange.id < x.id);
  older ? older.before(line) : $('#list').append(line);
  if (x.id === chosen && open?.pending) choose();
}
function settle(all) {
  due = 0;
  for (const [id, x] of coming)
    if (all || list.has(id) || id === chosen || !held()) { coming.delete(id); put(x); }
  for (let last; list.size > KEPT && (last = $('#list').lastChild); last.remove())
    list.delete(last.exchange.id);
  if (coming.size && !chosen && !$('#list').scrollTop) due = setTimeout(settle, 500);
  $('#more').hidden = !coming.size;
  $('#more').textContent = `${coming.size}${coming.size < KEPT ? '' : '+'} new`;
  $('#count').textContent = $('#filter').value && `${list.size} of ${kept}`;
  const view = chosen ? 'one' : list.size ? 'many' : 'none';
  if (document.body.className !== view && !chosen) welcome();
  document.body.className = view;
}
function arrive(x) {
  coming.set(x.id, x);
  if (coming.size > KEPT) coming.delete(coming.keys().next().value);
  due ||= setTimeout(settle, 100);
}
let events, listed;             // what tells of new ones; the query that filled the list
function listen() {
  const early = [];             // the last that came, perhaps while the list was asked for
  const query = `?q=${encodeURIComponent($('#filter').value)}`, load = async () => {
    early.length = 0;
    const old = x => list.get(x.id)?.exchange, {exchanges} = await call(`exchanges${query}`);
    if (!events.url.endsWith(query)) return;    // more has been typed
    if (listed === query && exchanges.some(x => old(x)?.at === x.at))   // of the same client
      return exchanges.filter(x => json(old(x)) !== json(x)).forEach(arrive);
    for (const one of [list, coming]) one.clear();
    $('#list').replaceChildren();
    exchanges.forEach(put);
    early.forEach(arrive);
    listed = query;
    choose();
  };
  events?.close();
  events = new EventSource(`/api/events${query}`);
  events.onmessage = e => {
    const x = JSON.parse(e.data);
    if (early.push(x) > KEPT) early.shift();
    arrive(x);
  };
  events.onopen = load;
  events.onerror = () => events.readyState === 2 && load().catch(e => say(e.message));  // filter
}

// The plot of the pace, [second, requests, errors, median, slowest]: a bar for five seconds.
function plot({pace, requests_per_second: now, median_ms: median}) {
  const column = (bar, i) => bar.map(second => second[i]), end = Date.now() / 1000;
  const sum = (bar, i) => column(bar, i).reduce((a, b) => a + b, 0), errors = sum(pace, 2);
  const bars = Array.from({length: 60}, (_, i) => pace.filter(
    ([at]) => Math.floor((end - at) / 5) === 59 - i));
  const most = Math.max(1, ...bars.map(bar => sum(bar, 1))), top = Math.max(1, ...column(pace, 4));
  const dash = n => ` ${38 - 34 * Math.log1p(n) / Math.log1p(top)}h4`;
  const draw = (id, shape) => $(id).setAttribute('d', bars.map(
    (bar, i) => bar.length ? `M${5 * i}${shape(bar)}` : '').join(''));
  draw('#rate', bar => ` 40v${-36 * sum(bar, 1) / most}h4V40`);
  draw('#errors', bar => ` 40v${-36 * sum(bar, 2) / most}h4V40`);
  draw('#median', bar => dash(column(bar, 3).sort((a, b) => a - b)[bar.length >> 1]));
  draw('#slowest', bar => dash(Math.max(...column(bar, 4))));
  $('#figures').replaceChildren(make('span', `${now} requests/s`),
    make(errors ? 'span.bad' : 'span.dim', `${errors} failed`),
    make('span.good', `median ${ms(median ?? 0)}`),
    make('span.warn', `slowest ${ms(pace.length && top)}`));
}

// Bodies.
const latin = data => Array.from(data, byte => String.fromCharCode(byte)).join('');
const unlatin = text => Uint8Array.from(text, c => c.charCodeAt());
const dataOf = ({body, encoding}) => encoding === 'base64' ? unlatin(atob(body))
  : new TextEncoder().encode(body);
const source = (type, data) => `data:${type};base64,${btoa(latin(data))}`;
const field = (part, name) => part.headers.find(([n]) => n.toLowerCase() === name)?.[1] ?? '';
const kindOf = type => type.split(';')[0].trim().toLowerCase();
function textOf(data, type) {   // null if it holds none; its last character may be cut
  const charset = type.match(/charset="?([\w-]+)/i)?.[1] ?? 'utf-8';
  try {
    const text = new TextDecoder(charset, {fatal: true}).decode(data, {stream: true});
    return text.includes('\0') ? null : text;
  } catch { return null; }
}
const hex = data => Array.from({length: Math.min(MOST, Math.ceil(data.length / 16))}, (_, i) => {
  const line = Array.from(data.slice(16 * i, 16 * i + 16)), seen = latin(line);
  const digits = (n, width) => n.toString(16).padStart(width, '0');
  return `${digits(16 * i, 6)}  ${line.map(n => digits(n, 2)).join(' ').padEnd(48)}  ${
    seen.replace(/[^ -~]/g, '.')}`;
}).join('\n');
async function unpack(data, coding) {   // and what is to be said of it
  const format = {br: 'brotli', 'x-gzip': 'gzip'}[coding] ?? coding, pieces = [];
  if (!format || format === 'identity') return [data, ''];
  let got = 0, at = 0;
  const drops = new ReadableStream({pull: to => at < data.length
    ? to.enqueue(data.slice(at, at += DROP)) : to.close()});
  try {
    const reader = drops.pipeThrough(new DecompressionStream(format)).getReader();
    for (let piece; got < UNPACKED && (piece = (await reader.read()).value); got += piece.length)
      pieces.push(piece);
    reader.cancel();
  } catch { }           // it was cut, or is not what it says
  return got ? [new Uint8Array(await new Blob(pieces).arrayBuffer()), `${coding}: ${size(got)}`]
    : [data, `${coding}, which this browser can't undo`];
}
function fold(label, makers, open) {    // what is inside is made when it is opened
  const inside = make('div'), build = () => inside.childNodes.length || inside.append(
    ...makers.slice(0, MOST).map(one => one()),
    makers.length > MOST ? `and ${makers.length - MOST} more` : '');
  if (open) build();
  return make('details', {open, ontoggle: build}, make('summary', label), inside);
}
const exact = (key, value, context) => typeof value === 'number' && context && JSON.rawJSON
  ? JSON.rawJSON(context.source) : value;       // 12345678901234567890 stays what it is
function jsonTree(value, name, depth = 0) {
  const label = name === undefined ? [] : [make('b', name), ': '], all = Object.entries(value ?? 0);
  return Object(value) !== value || JSON.isRawJSON?.(value)
    ? make('div', label, make(`span.${value?.at ? 'good' : 'warn'}`, json(value)))
    : fold([...label, Array.isArray(value) ? `[${all.length}]` : `{${all.length}}`],
      all.map(([key, one]) => () => jsonTree(one, key, depth + 1)), depth < 3 && all.length < 50);
}
function xmlTree(node, depth = 0) {
  if (node.nodeType !== 1) return make('div', node.nodeValue.trim());
  const words = [node.nodeName, ...Array.from(node.attributes, a => `${a.name}="${a.value}"`)];
  const label = make('b', `<${words.join(' ')}>`);
  const inside = [...node.childNodes].filter(one => one.nodeValue?.trim() !== '');
  return !node.childElementCount ? make('div', label, node.textContent.trim())
    : fold(label, inside.map(one => () => xmlTree(one, depth + 1)), depth < 4);
}
function partOf(text, depth) {  // of multipart
  const [head, ...rest] = text.trimStart().split('\r\n\r\n');
  const type = head.match(/^content-type: *(.*)$/im)?.[1] ?? 'text/plain';
  const data = unlatin(rest.join('\r\n\r\n').replace(/\r\n$/, ''));
  return make('div.box', make('p.dim', textOf(unlatin(head), '')), layOut(data, type, depth));
}
function layOut(data, type, depth = 0) {
  const boundary = type.match(/^multipart\/.*boundary="?([^";]+)/i)?.[1];
  const text = textOf(data, type), kind = kindOf(type);
  if (boundary && depth < NESTED) return make('div', latin(data).split(`--${boundary}`).slice(1)
    .filter(part => !part.startsWith('--')).slice(0, MOST).map(part => partOf(part, depth + 1)));
  if (/^image/.test(kind)) return make('img', {src: source(kind, data), alt: 'the image'});
  if (text === null) return make('pre', hex(data));
  try {
    if (/json/.test(kind) || /^\s*[[{]/.test(text)) return jsonTree(JSON.parse(text, exact));
    if (/urlencoded/.test(kind)) return table([...new URLSearchParams(text)]);
    const tree = /xml|html/.test(kind) && text.length < LONG && new DOMParser().parseFromString(
      text, /html/.test(kind) ? 'text/html' : 'text/xml');
    if (tree && !tree.querySelector('parsererror')) return xmlTree(tree.documentElement);
  } catch { }           // it is not what its type says
  return make('pre', text);
}
// What is left of markup in a preview, where policy and sandbox keep scripts, forms and loads out:
// browsers connect ahead of them, to be quicker, for what these elements name.
function harmless(text, tries = NESTED) {
  const page = new DOMParser().parseFromString(text.slice(0, LONG), 'text/html');
  for (const one of page.querySelectorAll('link, meta, template, iframe, frame, object, embed'))
    one.remove();
  for (const one of page.querySelectorAll('a, area'))
    for (const name of ['href', 'xlink:href']) one.removeAttribute(name);
  const left = `<!doctype html>${page.documentElement.outerHTML}`;
  return left === text ? text : tries ? harmless(left, tries - 1) : '';  // it may read differently
}
async function message(title, part, note) {
  if (!part) return null;
  const type = field(part, 'content-type'), data = dataOf(part);
  const [plain, coding] = await unpack(data, field(part, 'content-encoding').toLowerCase());
  return make('section', make('h3', title),
    make('div.box', make('p.mono.wrap', part.line), table(part.headers)),
    !data.length ? null : [make('div.box.tree', {tabIndex: 0}, layOut(plain, type)), make('div.bar',
      make('a', {href: source('', data), download: `body.${kindOf(type).split(/\W/).pop()}`},
        'Download'), make('span.dim', coding)),
    fold('As it came', [() => make('pre.box', textOf(data, type) ?? hex(data))]),
    /html/.test(type) ? fold('Preview', [() => make('iframe.box', {
      sandbox: '', srcdoc: harmless(textOf(plain, type) ?? '')})]) : null],
    part.truncated ? make('p.warn', note) : null,
    part.trailers.length ? make('div.box', 'Trailers', table(part.trailers)) : null);
}

// What differs from the request before it to the same route: what can be compared, by name.
function facts(x) {
  const all = new Map(), {headers, body} = x.request, type = field(x.request, 'content-type');
  const add = (value, name) => all.set(name, all.has(name) ? `${all.get(name)}, ${value}` : value);
  const leaves = (value, path) => Object(value) !== value ? add(json(value), path)
    : Object.entries(value).forEach(([key, inside]) => leaves(inside, `${path}.${key}`));
  new URLSearchParams(x.target.split('?')[1]).forEach((value, name) => add(value, `?${name}`));
  headers.forEach(([name, value]) => add(value, name.toLowerCase()));
  try {
    leaves(/urlencoded/i.test(type) ? Object.fromEntries(new URLSearchParams(body))
      : JSON.parse(body), 'body');
  } catch { add(body, 'body'); }
  return all.set('status of the answer', String(x.status));
}
let secrets = false;            // are shown
const details = id => call(`exchanges/${id}${secrets ? '?secrets=1' : ''}`);
const route = x => x.method + x.target.split('?')[0].replace(/[0-9a-f-]{8,}|\d+/gi, '*');
async function differences(x) {
  const before = Math.max(...Array.from(list.values(), line => line.exchange).filter(
    one => one.id < x.id && route(one) === route(x)).map(one => one.id));
  const old = x.request && before > 0 ? await details(before) : {};
  if (!old.request) return null;
  const then = facts(old), now = facts(x), names = [...new Set([...then.keys(), ...now.keys()])]
    .filter(name => then.get(name) !== now.get(name));
  const count = make('b', `${names.length} change${names.length === 1 ? '' : 's'}`);
  return fold([count, ' since ', link(before)], [() => table(names.map(name => [name,
    make('span.bad', then.get(name)?.slice(0, MOST) ?? ''),
    make('span.good', now.get(name)?.slice(0, MOST) ?? '')]))], names.length > 0);
}

// One exchange.
async function choose() {
  const id = chosen = Number(location.hash.slice(1)) || 0;
  for (const [one, line] of list) line.firstChild.ariaCurrent = one === id || null;
  settle();
  if (!id) return welcome();
  try {
    const x = await details(id);
    const parts = await Promise.all([...summary(x), differences(x),
      message('Request', x.request, 'Not all of it was kept; --inspect-body KIB keeps more.'),
      message('Response', x.response, 'Its first 64 KiB are kept.')]);
    if (id !== chosen) return;
    open = x;
    $('article').replaceChildren(...parts.filter(Boolean));
  } catch (e) { say(e.message); location.hash = ''; }
}
function summary(x) {
  const {first_byte_ms: first, end_ms: end} = x.timing;
  return [
    make('div.bar', make(`h2.${tone(x)}`, x.status || '\u2013'),
      make('h2.mono.wide.wrap', `${x.method} ${x.target}`), button('Close', KEYS.Escape[1])),
    make('p.dim', x.tunnel && `${x.tunnel}, `,
      `#${x.id}, ${new Date(x.at).toLocaleString()}, from ${x.visitor}, ${
        size(x.request_bytes)} in, ${size(x.response_bytes)} out`,
      x.replay_of ? [', a replay of ', link(x.replay_of)] : null),
    x.error && make('p.bad', `Failed at ${HOPS[x.failed]}: ${x.error}`),
    x.request && make('div.bar', button('Replay', () => replay(), 'button.main'),
      button('Edit', edit),
      Object.keys(COPIES).map(name => button(`Copy as ${name}`, () => copyAs(name))),
      button(`${secrets ? 'Hide' : 'Show'} secrets`, () => { secrets = !secrets; choose(); })),
    x.signature && make('p.warn', x.signature),
    make('label', make('progress', {max: end || 1, value: first ?? 1}), first === null
      ? 'no answer' : `${ms(first)} until the app's first byte${end === null
        ? '; it goes on' : `, then ${ms(end - first)} for the body`}`),
    x.messages && make('div.box.mono', `${x.message_counts[0]} messages from the visitor, ${
      x.message_counts[1]} from the app`, table(x.messages.map(
      one => [`${one.from} ${ms(one.ms)}`, one.text + (one.truncated ? '\u2026' : '')]))),
  ];
}

// Replay.  What is masked goes back as it is, and the client knows what it stands for.
const replay = edited => call(`exchanges/${open.id}/replay`, 'POST', edited).then(
  ({id}) => location.hash = id, e => say(e.message));
const asLines = fields => fields.map(one => one.join(': ')).join('\n');
const asFields = text => text.split('\n').filter(Boolean).map(
  line => line.match(/^([^:]*):?\s*(.*)/).slice(1));
function edit() {
  const {verb, path, headers, body, trailers} = $('form'), {method, target, request} = open;
  const binary = request.encoding === 'base64';
  [verb.value, path.value, trailers.value] = [method, target, asLines(request.trailers)];
  headers.value = asLines(request.headers.filter(([name]) => !/^content-length$/i.test(name)));
  body.value = binary ? '' : request.body;
  body.placeholder = binary ? 'binary, and sent as it was unless you write something' : '';
  const before = body.value, end = request.body.includes('\r\n') ? '\r\n' : '\n';
  $('#edit').showModal();
  $('form').onsubmit = e => e.submitter.value && replay({method: verb.value, target: path.value,
    headers: asFields(headers.value), trailers: asFields(trailers.value),
    ...body.value === before ? {} : {body: body.value.replaceAll('\n', end)}});
}

// Copies, to be pasted elsewhere: nothing in them ends its quotes, or acts as a key (Ctrl-C).
const quoted = text => `'${text.replaceAll("'", `'\\''`)}'`;
const COPIES = {
  curl: (url, method, headers, body, binary) => [
    `${binary ? `echo ${body} | base64 -d | ` : ''}curl --globoff --path-as-is ${quoted(url)}`,
    method === 'HEAD' ? '--head' : `-X ${quoted(method)}`,
    ...headers.map(([name, value]) => `-H ${quoted(value ? `${name}: ${value}` : `${name};`)}`),
    body && !headers.some(([name]) => /^content-type$/i.test(name)) && "-H 'Content-Type:'",
    body && (binary ? '--data-binary @-' : `--data-raw ${quoted(body)}`),
  ].filter(Boolean).join(' \\\n  '),
  Python: (url, method, headers, body, binary) => `import base64, urllib.request
request = urllib.request.Request(
    ${json(url)}, method=${json(method)}, headers=${json(Object.fromEntries(headers))},
    data=${!body ? 'None' : binary ? `base64.b64decode('${body}')` : `${json(body)}.encode()`})
print(urllib.request.urlopen(request).read())\n`,
  fetch: (url, method, headers, body, binary) => `await fetch(${json(url)}, {method: ${
    json(method)}, headers: ${json(headers)}, body: ${!body ? 'undefined' : binary
    ? `Uint8Array.from(atob('${body}'), c => c.charCodeAt())` : json(body)}})\n`,
};
const HOP = /^(host|content-length|transfer-encoding|connection|accept-encoding|via|x-forwarded-)/i;
function copyAs(name) {
  const {method, target, request} = open, {headers, body, encoding, truncated} = request;
  const binary = encoding === 'base64' || /[^\t\n -~\xa0-\uffff]/.test(body);
  const from = tunnels.find(one => one.name === open.tunnel) ?? tunnels[0];
  const text = COPIES[name](from.url + target, method, headers.filter(
    ([n]) => !HOP.test(n)), binary ? btoa(latin(dataOf(request))) : body, binary);
  copy(text, `${truncated ? 'With the body cut short, ' : ''}${
    text.includes('***') ? 'with *** for secrets, ' : ''}${name}`);
}

// Where nothing is chosen: the URL, as text and as a QR code.
function welcome() {
  const url = $('#url').textContent, command = `curl ${url}`;
  open = null;
  $('article').replaceChildren(
    make('h2', list.size ? 'Choose one of them, or make another' : 'Nothing has passed yet'),
    make('div.bar', make('code.box.wrap', command), button('Copy', () => copy(command, 'Command'))),
    /localhost/.test(url) ? '' : qr(url));
}
function qr(text) {             // version 5, for up to 106 bytes, level L, mask 0
  const bytes = [...new TextEncoder().encode(text)], grid = Array.from({length: 37}, () => []);
  if (bytes.length > 106) return '';
  const bits = all => all.map(byte => byte.toString(2).padStart(8, '0')).join('');
  const data = `0100${bits([bytes.length, ...bytes])}0000`.match(/.{8}/g).map(n => parseInt(n, 2));
  for (let i = 0; data.length < 108; i++) data.push(i % 2 ? 0x11 : 0xec);
  const times = (a, b) => b && (b & 1) * a ^ times(a << 1 ^ (a > 127) * 0x11d, b >> 1);
  let generator = [1], rest = [...data, ...Array(26).fill(0)];      // Reed and Solomon's
  for (let i = 0, root = 1; i < 26; i++, root = times(root, 2))
    generator = [...generator, 0].map((n, j) => n ^ times(generator[j - 1] ?? 0, root));
  for (const _ of data) rest = rest.map((n, j) => n ^ times(generator[j] ?? 0, rest[0])).slice(1);
  const eyes = [[3, 3, '11010'], [33, 3, '11010'], [3, 33, '11010'], [30, 30, '101']];
  for (const [x, y, rings] of eyes)
    for (let i = -4; i < 5; i++) for (let j = -4; j < 5; j++) {
      const dark = rings[Math.max(Math.abs(i), Math.abs(j))];
      if (dark && grid[y + i] && grid[x + j]) grid[y + i][x + j] = Number(dark);
    }
  for (let i = 8; i < 29; i++) grid[6][i] = grid[i][6] = (i + 1) % 2;
  for (let i = 0; i < 15; i++)          // level and mask, twice
    grid[i < 6 ? i : i < 8 ? i + 1 : 22 + i][8] =
      grid[8][i < 8 ? 36 - i : i < 9 ? 7 : 14 - i] = 0x77c4 >> i & 1;
  grid[29][8] = 1;
  const stream = [...bits([...data, ...rest])];
  for (let right = 36; right > 0; right -= right === 8 ? 3 : 2)
    for (let i = 0; i < 37; i++) for (const x of [right, right - 1]) {
      const y = right + (right < 6) & 2 ? i : 36 - i;           // up, and down again
      grid[y][x] ??= stream.shift() ^ (x + y + 1) % 2;
    }
  const canvas = make('canvas', {width: 45, height: 45, role: 'img', ariaLabel: text});
  grid.forEach((line, y) => line.forEach(
    (dark, x) => dark && canvas.getContext('2d').fillRect(x + 4, y + 4, 1, 1)));
  return canvas;
}

// Keys, and what is live.
const KEYS = {
  j: ['next', () => step(1)], k: ['previous', () => step(-1)],
  r: ['replay', () => open?.request && replay()], e: ['edit', () => open?.request && edit()],
  c: ['copy as curl', () => open?.request && copyAs('curl')],
  '/': ['filter', () => $('#filter').focus()],
  '?': ['these keys', () => $('#help').showModal()], Escape: ['close', () => location.hash = ''],
};
function step(by) {
  const lines = [...$('#list').children], at = lines.indexOf(list.get(chosen)) + by;
  const row = lines[Math.min(Math.max(at, 0), lines.length - 1)]?.firstChild;
  for (const act of ['click', 'focus']) row?.[act]();
}
onkeydown = e => {
  if (e.ctrlKey || e.altKey || e.metaKey || $('dialog[open]') || !KEYS[e.key]) return;
  if (e.target.id === 'filter') return e.key === 'Escape' && e.target.blur();
  e.preventDefault();
  KEYS[e.key][1]();
};
let tunnels = [], place;
async function look() {         // and touch only what has changed: it may be selected, or read out
  const state = $('#state'), url = $('#url'), is = (text, tone) =>
    state.textContent === text || Object.assign(state, {textContent: text, className: tone});
  try {
    const status = await call('status');
    if (place !== (place = json(status.tunnels))) {
      tunnels = status.tunnels;
      Object.assign(url, {textContent: status.url, href: status.url});
      $('#target').replaceChildren(...tunnels.map((one, i) => make('div',
        i ? make('a.mono', {href: one.url, target: '_blank', rel: 'noreferrer'}, one.url) : '',
        ` \u2192 ${one.target}${one.name && ` (${one.name})`}`)));
      if (!chosen) welcome();
    }
    kept = status.kept;
    plot(status);
    if (events.readyState === 2) listen();      // it is closed
    is('live', 'good');
  } catch { is('the client has ended', 'bad'); }
}
onhashchange = choose;
document.onvisibilitychange = () => document.hidden ? events.close() : listen();  // six may live
$('#help').append(table(Object.entries(KEYS).map(([key, [what]]) => [key, what])));
$('#filter').oninput = listen;
$('#more').onclick = () => { settle(true); $('#list').scrollTop = 0; };
$('#copy').onclick = () => copy($('#url').textContent, 'URL');
$('#clear').onclick = () => call('exchanges', 'DELETE').then(listen).then(KEYS.Escape[1]);
$('#list').onpointermove = () => moved = performance.now();
setInterval(() => document.hidden || look(), 2000);
listen();
look();
</script>
'''


# ------------------------------------------------------------------------------------------------
# 53. Inspector
#
# Shows the exchanges of a client to the people at its machine: a small HTTP server with a page and
# an API of JSON, for the commands of the next room, too.  No stream's path waits for it.
# ------------------------------------------------------------------------------------------------

INSPECTOR_PORT, INSPECTOR_PORTS = 4040, 100     # the first to try, by habit, and how many
SECRETS_FIELD = b'localtunnel-inspector'        # who sends it may see secrets: no other site can
MAX_INSPECTORS = 100            # connections at a time
EVENTS_TOGETHER = 0.05          # seconds between writes of events to a page
EVENTS_APART = 0.001            # and for each event as much more: a thousand a second is plenty
EVENTS_UNREAD = 1 * MIB         # by a page that has stopped reading; then it is let go
EVENTS_SILENT = 15.0            # a comment is sent, so that a page that is gone is noticed
REPLAY_WAIT = 30.0              # for the answer of a replay; then it goes on by itself
REPLAY_MOST = 3600.0            # for all of a replay: an endless answer has an end
EDIT_ROOM = 256 * KIB           # of JSON around the body of an edited replay


class Inspector:
    """One request to the inspector of a client, and its answer."""
    here: dict[Connection, bool] = {}   # of all: whether it waits for an answer; the first first

    def __init__(self, book: Exchanges, host: str, passwords: Sequence[str],
                 connection: Connection) -> None:
        """It was told to listen on HOST, and to ask for one of PASSWORDS, if there is any."""
        self._book, self._connection = book, connection
        self._host, self._passwords = host, passwords
        self._request: Request = None           # type: ignore[assignment]  # it is read first
        self._words: dict[str, str] = {}        # of its query
        self._body = b''

    async def serve(self) -> None:
        """Read it, answer it, and close the connection."""
        connection = self._connection
        connection.timeout = HEAD_TIMEOUT
        self.here[connection] = False
        if len(self.here) > MAX_INSPECTORS:     # who asks nothing makes room
            silent = next(one for one, waits in self.here.items() if not waits)
            del self.here[silent]
            silent.close()
        try:
            await self._serve()
            self.here[connection] = False
            await connection.linger()
        except (LocaltunnelError, OSError):
            connection.abort()
        finally:
            connection.close()
            self.here.pop(connection, None)

    async def _serve(self) -> None:
        try:
            head = await read_head(self._connection, HEAD_TIMEOUT)
            if head is not None:
                self._request = parse_request(head)
                self._check()
                await self._check_password()
                await self._answer()
        except (BadHttp, HopFailed) as e:
            await self._write(e.status, 'application/json', json.dumps({'error': str(e)}),
                              *getattr(e, 'extra', ()))

    def _check(self) -> None:
        """Raise HopFailed unless it comes from this machine, and from no other site's page."""
        request, told = self._request, self._host
        host, origin = request.host_name, request.find(b'origin')
        # A tunnel to this inspector adds such fields; raw TCP does not, but comes from here.
        passed = {*request.untrusted()} - {SECRETS_FIELD} or request.has(b'via')
        transport = self._connection.transport
        ends = [transport.get_extra_info(name) for name in ('peername', 'sockname')]
        if passed or any([other.get_extra_info(name) for name in ('sockname', 'peername')] == ends
                         for other in self._connection.runtime.transports):
            raise HopFailed(403, 'the inspector is not shown through a tunnel or a proxy')
        if not self._passwords and not is_loopback(self._connection.peer):
            raise HopFailed(403, 'the inspector is for its own machine')
        if not (host in ('localhost', told) or is_address(host) and (
                is_loopback(host) or told in ('0.0.0.0', '[::]'))):
            raise HopFailed(403, 'open the inspector as localhost')      # DNS rebinding
        page = request.target.partition(b'?')[0] == b'/' and request.method == b'GET'
        if request.has(b'origin') and origin.lower() != f'http://{request.host.decode()}' or (
                request.find(b'sec-fetch-site') not in ('', 'same-origin', 'none') and not page):
            raise HopFailed(403, 'a page of another site asks for this')

    async def _check_password(self) -> None:
        """Raise HopFailed unless it has a password, if there is one (HTTP Basic)."""
        scheme, _, said = self._request.find(b'authorization').partition(' ')
        given = b''
        with contextlib.suppress(ValueError):
            given = base64.b64decode(said, validate=True).partition(b':')[2]
        right = [hmac.compare_digest(given, one.encode()) for one in self._passwords]
        if right and not (scheme.lower() == 'basic' and any(right)):
            await asyncio.sleep(WRONG_TOKEN if given else 0)
            raise HopFailed(401, 'the inspector asks for its password; any user name will do',
                            'WWW-Authenticate: Basic realm="localtunnel inspector"')

    async def _answer(self) -> None:
        """Find who answers it; what that returns is JSON, or None if it has answered itself."""
        request = self._request
        most = 2 * self._book.most + EDIT_ROOM if request.method == b'POST' else 0
        self._body = await read_whole(body_reader(self._connection, request.length), most)
        if len(self._body) > most:
            raise BadHttp(413, f'the body has more than {most} bytes')
        self.here[self._connection] = True
        path, _, query = request.target.decode('latin-1').partition('?')
        self._words = dict(urllib.parse.parse_qsl(query))
        calls = next((self.CALLS[one] for one in self.CALLS if re.fullmatch(one, path)), {})
        if not calls:
            raise HopFailed(404, 'there is nothing here; the API is described in README')
        answer = calls.get(request.method.decode())
        if not answer:
            raise HopFailed(405, f'{path} takes {" and ".join(calls)}',
                            f'Allow: {", ".join(calls)}')
        value = await answer(self, *re.findall('[0-9]+', path))
        if value is not None:
            await self._write(200, 'application/json', json.dumps(value))

    async def _write(self, status: int, form: str, text: str, *extra: str) -> None:
        """Answer with TEXT; the fields see to it that no other site gets it, in any guise."""
        await Own(status, form, [text.encode()], [
            'Connection: close', 'X-Content-Type-Options: nosniff', 'Referrer-Policy: no-referrer',
            'Cross-Origin-Resource-Policy: same-origin', *extra]).write(self._connection)

    async def _begin(self, form: str, *extra: str) -> None:
        """Write the head of an answer that comes piece by piece."""
        await self._connection.write('\r\n'.join([
            'HTTP/1.1 200 OK', f'Content-Type: {form}', 'Cache-Control: no-store',
            'Connection: close', 'X-Content-Type-Options: nosniff', *extra,
            date_line(int(time.time())), '', '']).encode())

    # The answers, by method and path in CALLS; README has the contract.

    async def _page(self) -> None:
        """GET /: for people.  Nobody may frame it: a click there must be meant."""
        script = INSPECTOR_PAGE.partition('<script>')[2].partition('</script>')[0]
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        await self._write(
            200, HTML, INSPECTOR_PAGE, 'X-Frame-Options: DENY', "Content-Security-Policy: "
            f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
            "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'")

    async def _chosen(self) -> list[Kept]:
        """Return what the query asks for, oldest first; it takes its time."""
        chosen = Filter(self._words.get('q', ''))
        found: list[Kept] = []
        for name in ('after', 'limit'):
            if not re.fullmatch('[0-9]{1,15}', self._words.get(name, '0')):
                raise BadHttp(400, f'{name} takes a number, not {self._words[name]!r}')
        after, most = (int(self._words.get(name, other))
                       for name, other in (('after', 0), ('limit', sys.maxsize)))
        for kept in self._book.all():
            if len(found) < most and kept.number > after and chosen.fits(
                    kept.summary(), kept.details):
                found.append(kept)
            if chosen.texts:
                await asyncio.sleep(0)
        return found

    async def _list(self) -> Any:
        """GET /api/exchanges: those that fit, as a list shows them."""
        return {'exchanges': [kept.summary() for kept in await self._chosen()],
                'dropped': self._book.seen - len(self._book.kept)}

    async def _clear(self) -> None:
        """DELETE /api/exchanges: those that run go on, and are not listed any more."""
        self._book.forget()
        await write_own(self._connection, b'HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n')

    def _find(self, number: str) -> Kept:
        """Return what is kept of exchange NUMBER.  Raises HopFailed."""
        for kept in self._book.all():
            if kept.number == int(number):
                return kept
        raise HopFailed(404, f'exchange {number} is not kept, or never was')

    async def _one(self, number: str) -> Any:
        """GET /api/exchanges/ID: with its secrets only where no other site can have asked."""
        show = self._words.get('secrets') == '1'
        if show and not self._request.has(SECRETS_FIELD):
            raise HopFailed(403, 'secrets are shown to a request with the field '
                            'Localtunnel-Inspector, which no other site can send')
        return self._find(number).details(show)

    async def _status(self) -> Any:
        """GET /api/status: how the tunnel does."""
        book = self._book
        book.sweep(0, False)            # a second may just have ended
        since = int(time.time()) - PACE_NOW
        took = sorted(kept.seconds for kept in tuple(book.kept)[-100:] if kept.seconds is not None)
        tunnels = [tunnel.about() for tunnel in book.tunnels
                   if not tunnel.app.closed] or [book.tunnels[-1].about()]
        return {**tunnels[0], 'tunnels': tunnels,
                'requests_per_second': sum(n for at, n, *_ in book.pace if at >= since) / PACE_NOW,
                'open': sum(len(tunnel.app.under_way) for tunnel in book.tunnels),
                'seen': book.seen, 'kept': len(book.kept),
                'median_ms': round(took[len(took) // 2] * 1e3, 1) if took else None,
                'kept_bytes': book.used, 'dropped': book.seen - len(book.kept),
                'pace': list(book.pace), 'version': __version__}

    async def _events(self) -> None:
        """GET /api/events: exchanges as they come, while the page is there, and reads.

        What tells it makes a note in `due`; a turn of the loop below writes all that is noted, and
        the next turn comes the later, the more that was.  So a page costs little under any load.
        """
        chosen, connection = Filter(self._words.get('q', '')), self._connection
        news = asyncio.Event()
        due: dict[int, Kept] = {}           # what it has to be told, by number
        missed = 0                          # of these, too many at once

        def tell(kept: Kept) -> None:
            nonlocal missed
            due[kept.number] = kept
            if len(due) > KEPT_EXCHANGES:
                del due[next(iter(due))]
                missed += 1
            news.set()
        await self._begin('text/event-stream')
        connection.on_eof = connection.on_lost = news.set
        self._book.listeners.append(tell)
        lines = [':\n\n']       # a comment: this works
        try:
            while not connection.eof and connection.error is None:
                connection.transport.write(''.join(lines).encode())
                if connection.transport.get_write_buffer_size() > EVENTS_UNREAD:
                    return connection.abort()
                await asyncio.sleep(EVENTS_TOGETHER + EVENTS_APART * len(lines))
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(news.wait(), EVENTS_SILENT)
                noted, gone, missed = [*due.values()], missed, 0
                lines = [] if noted else [':\n\n']
                due.clear()
                news.clear()
                for kept in noted:
                    summary = kept.summary()
                    if chosen.fits(summary, kept.details):
                        lines.append(f'data: {json.dumps(summary)}\n\n')
                    if chosen.texts:
                        await asyncio.sleep(0)      # looking for text in a body may take long
                if gone:
                    lines.append(f'event: missed\ndata: {gone}\n\n')
        finally:
            self._book.listeners.remove(tell)

    async def _har(self) -> None:
        """GET /api/har: those that fit; the archive may be large, so it is made as it is read."""
        found = await self._chosen()
        await self._begin('application/json',
                          'Content-Disposition: attachment; filename="localtunnel.har"')
        for piece in har_pieces(kept.details() for kept in found):
            await write_own(self._connection, piece.encode())
            await asyncio.sleep(0)

    async def _replay(self, number: str) -> Any:
        """POST /api/exchanges/ID/replay: send it again, perhaps edited; its new number.

        That is told once the answer is there, or after REPLAY_WAIT: some answers have no end.
        """
        kept = self._find(number)
        exchange = kept.details(show=True)
        why = not_replayable(exchange)
        if why:
            raise HopFailed(409, why)
        try:
            edits = json.loads(self._body or b'{}')
        except (ValueError, RecursionError):
            edits = None
        if not isinstance(edits, dict):
            raise BadHttp(400, 'the body is not a JSON object')
        edited, runtime = Edited(exchange, edits), self._connection.runtime
        stream, made = Replay(runtime, edited.message(exchange['id'])), []

        def begins(again: Kept) -> None:
            if isinstance(again.record, Exchange) and again.record.near is stream:
                self._book.listeners.remove(begins)
                made.append(again.number)
                again.edited = edited.changed
        self._book.listeners.append(begins)
        # As if it came through the tunnel: by the same way to the app, and kept like others.
        sending = runtime.spawn(kept.watched.app.serve(stream))  # type: ignore[arg-type]
        overdue = runtime.loop.call_later(REPLAY_MOST, stream.reset, CANCELLED,
                                          'a replay does not take longer than an hour')
        sending.add_done_callback(lambda task: overdue.cancel())
        try:
            await asyncio.wait({sending}, timeout=REPLAY_WAIT)
        finally:
            if not made:
                self._book.listeners.remove(begins)
        if not made:
            raise BadHttp(400, f'it was not sent: {stream.error}')
        return {'id': made[0], 'left_out': edited.left_out}

    CALLS: Mapping[str, Mapping[str, Callable[..., Awaitable[Any]]]] = {
        '/': {'GET': _page}, '/api/exchanges': {'GET': _list, 'DELETE': _clear},
        '/api/exchanges/([0-9]{1,15})': {'GET': _one}, '/api/events': {'GET': _events},
        '/api/exchanges/([0-9]{1,15})/replay': {'POST': _replay}, '/api/har': {'GET': _har},
        '/api/status': {'GET': _status}}


async def listen_on(book: Exchanges, host: str, sockets: Sequence[socket.socket], note: str,
                    said: dict[str, Any]) -> None:
    """Serve on SOCKETS, of HOST, until it is cancelled; meanwhile the file NOTE holds SAID.

    Of the password there is another one in its place, which opens nothing once this has ended.
    """
    runtime = book.runtime
    passwords = [said['password'], secrets.token_hex(16)] if said['password'] else []
    said = {**said, 'password': ''.join(passwords[1:])}

    def serve(connection: Connection) -> Coroutine[Any, Any, None]:
        return Inspector(book, host, passwords, connection).serve()
    doors = [await runtime.loop.create_server(
        lambda: Connection(runtime, serve), sock=sock) for sock in sockets]
    with contextlib.suppress(OSError):      # then the commands need --inspect PORT
        os.makedirs(os.path.dirname(note), mode=0o700, exist_ok=True)
        write_secret(note, json.dumps(said).encode())
    try:
        await runtime.loop.create_future()
    finally:
        for door in doors:
            door.close()
        with contextlib.suppress(OSError):
            os.unlink(note)


# ------------------------------------------------------------------------------------------------
# 54. Logs and replay
#
# Exchanges beyond the client that saw them: a file that a client writes, and the commands `logs`
# and `replay`, which read such a file or ask the inspector of a client that runs.
# ------------------------------------------------------------------------------------------------

FOLLOW_LOOK = 0.2               # seconds between looks at the end of a file (logs --follow)


class Recorder:
    """Appends exchanges to a file, a line each, in a thread: a slow disk holds nothing up.

    It holds none of them: what the book lets go before the disk has taken it is missing.
    """

    def __init__(self, path: str, show: bool, app: App) -> None:
        """Of what passes at APP; SHOW secrets or mask them.  Raises UsageError."""
        self._path, self._show, self._app = path, show, app
        try:
            self._file = open(path, 'a+b', 0, opener=functools.partial(os.open, mode=0o600))
            if os.name == 'posix' and stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                os.fchmod(self._file.fileno(), 0o600)
            # A line that a crash has cut short must not spoil the next one.
            self._torn = os.path.getsize(path) > 0 and (
                self._file.seek(-1, os.SEEK_END) >= 0 and self._file.read(1) != b'\n')
        except OSError as e:
            raise UsageError(f"can't write --record {path}: {e.strerror}") from e
        # Those that are to be written: like the book, the queue lets go of the oldest.
        self._due: collections.deque[weakref.ref[Kept]] = collections.deque(maxlen=KEPT_EXCHANGES)
        self._news, self._ending = threading.Event(), False
        self._told = self._written = 0      # exchanges: the difference is what is missing
        self._warned = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        app.seen.listeners.append(self._tell)
        app.runtime.spawn(self._until_the_end())

    def _tell(self, kept: Kept) -> None:
        """Write KEPT, if it has ended, soon."""
        if kept.seconds is not None:
            self._told += 1
            self._due.append(weakref.ref(kept))
            self._news.set()

    def _run(self) -> None:
        """Write what comes; this is the thread."""
        while not self._ending:
            self._news.wait()
            self._news.clear()
            while self._due:
                kept = self._due.popleft()()
                if kept is not None:
                    self._write(json.dumps(kept.details(self._show)).encode() + b'\n')
        self._file.close()

    def _write(self, line: bytes) -> None:
        """Write LINE at once, so that a crash leaves it whole or torn, and never mixed."""
        line, why = (b'\n' if self._torn else b'') + line, 'the disk is full'
        try:
            done = os.write(self._file.fileno(), line)
        except OSError as e:
            done, why = 0, str(e.strerror)
        if done == len(line):
            self._torn, self._written = False, self._written + 1
            return
        self._torn = self._torn or done > 0
        if not self._warned:            # how much is missing is said at the end
            self._warned = True
            with contextlib.suppress(RuntimeError):     # the loop has ended
                self._app.runtime.loop.call_soon_threadsafe(
                    self._app.observer.note, f"warning: can't record in {self._path}: {why}; "
                    'exchanges are missing there')

    async def _until_the_end(self) -> None:
        """Write what is left, if the disk takes it soon, and say what is missing."""
        try:
            await self._app.runtime.loop.create_future()
        finally:
            self._ending = True
            self._news.set()
            self._thread.join(LAST_LINES)
            if self._told > self._written:
                self._app.observer.note(f'{self._told - self._written} exchanges are missing in '
                                        'the record')


NUMBER, NOTHING = (int, float), type(None)
SIDE = {'line': str, 'headers': FIELDS, 'trailers': FIELDS, 'body': str, 'encoding': str,
        'truncated': bool}
SUMMARY = {'id': int, 'kind': str, 'at': str, 'method': str, 'target': str, 'status': int,
           'ms': NUMBER, 'request_bytes': int, 'response_bytes': int, 'error': str, 'failed': str}
EXCHANGE = {**SUMMARY,
            'request': (SIDE, NOTHING), 'response': (SIDE, NOTHING), 'messages': [{'text': str}],
            'timing': {'first_byte_ms': (*NUMBER, NOTHING), 'end_ms': (*NUMBER, NOTHING)}}
NOTE = {'host': str, 'port': int, 'password': str}      # of a client, where its inspector is

NO_INSPECTOR = 'this is not the inspector of a client'


def is_exchange(value: Any) -> bool:
    """Return True if VALUE is what Kept.details returns."""
    return isinstance(value, dict) and fits({'messages': [], **value}, EXCHANGE)


MAX_RECORDED = 64 * MIB         # of a line: the largest request of --inspect-body, in base64


def lines_of(path: str, follow: bool) -> Iterator[bytearray]:
    """Return the lines of the file PATH, and with FOLLOW those that are still written.

    Without it, what is added meanwhile is left out: a replay may be recorded there.  Of a line that
    is too long only the beginning is returned.
    """
    line = bytearray()
    with open(path, 'rb') as f:
        status = os.fstat(f.fileno())
        left = NEVER if follow or not stat.S_ISREG(status.st_mode) else status.st_size
        while True:
            piece = f.readline(MIB) if left > 0 else b''
            left -= len(piece)
            line += piece if len(line) < MAX_RECORDED else b''
            if piece.endswith(b'\n') or line and not piece and not follow:
                yield line
                line = bytearray()
            elif not piece and not follow:
                return
            elif not piece:
                time.sleep(FOLLOW_LOOK)


def recorded(path: str, follow: bool, warn: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Return the exchanges in the file PATH.  Raises UsageError."""
    torn = 0
    try:
        for line in lines_of(path, follow):
            exchange: Any = None
            with contextlib.suppress(ValueError, RecursionError):
                exchange = json.loads(line) if len(line) < MAX_RECORDED else None
            if is_exchange(exchange):
                yield exchange
            else:
                torn += not line.isspace()
    except OSError as e:
        raise UsageError(f"can't read {path}: {e.strerror}") from e
    if torn:
        warn(f'{path}: left out {torn} line{"s" * (torn > 1)}, torn or of something else')


class Remote:
    """The inspector of a client that runs, from another process."""

    def __init__(self, place: tuple[str, int] | None, password: str | None) -> None:
        """It is at PLACE, else of the newest client of this user.  Raises LocaltunnelError."""
        notes = self._notes()
        if place:       # a client of this user has noted its password, too
            known = {said['port']: said['password'] for _, said in notes}
            self._place, self._password = place, password or known.get(place[1], '')
            return
        for path, said in notes:
            self._place = said['host'], said['port']
            self._password = password or said['password']
            with contextlib.suppress(LocaltunnelError):
                self.ask('GET', '/api/status', {'target': str})
                return
            with contextlib.suppress(OSError):      # what a client left that was killed
                os.unlink(path)
        raise LocaltunnelError('no client of yours runs here with an inspector; start one, or give '
                               'its port with --inspect')

    @staticmethod
    def _notes() -> list[tuple[str, dict[str, Any]]]:
        """Return (path, what it says) of the notes of this user's clients, the newest first."""
        found = []
        for path in glob.glob(config_path(os.path.join('inspectors', '*'))):
            with contextlib.suppress(OSError, ValueError), open(path, encoding='utf-8') as f:
                said = json.load(f)
                if fits(said, NOTE):
                    found.append((os.path.getmtime(path), path, said))
        return [item[1:] for item in sorted(found, key=lambda item: -item[0])]

    def open(self, method: str, path: str, value: Any = None, whole: bool = True) -> Any:
        """Return (status, body) of the answer; unless WHOLE the body is what its lines come from.

        Raises LocaltunnelError.
        """
        import http.client
        connection = http.client.HTTPConnection(*self._place, timeout=2 * REPLAY_WAIT)
        code = base64.b64encode(f':{self._password}'.encode()).decode()
        try:
            connection.request(method, path, value and json.dumps(value), {
                'Localtunnel-Inspector': 'shell', 'Authorization': f'Basic {code}'})
            response = connection.getresponse()
            return response.status, response.read() if whole else response
        except (OSError, http.client.HTTPException) as e:
            raise LocaltunnelError(f'no inspector answers on {self._place[0]}, '
                                   f'port {self._place[1]} ({printable(plainly(e))}); the '
                                   'banner of a client says where its own is') from e
        finally:
            connection.close()

    @staticmethod
    def told(data: bytes, shape: Any, status: int = 200) -> Any:
        """Return the JSON of SHAPE that DATA is, with STATUS.  Raises LocaltunnelError."""
        try:
            answer = json.loads(data)
            if status < 400 and fits(answer, shape):
                return answer
            why = str(answer['error'])
        except (ValueError, KeyError, TypeError, RecursionError):
            why = NO_INSPECTOR
        raise LocaltunnelError(printable(why[:MAX_TEXT]))

    def ask(self, method: str, path: str, shape: Any, value: Any = None) -> Any:
        """Return the JSON of SHAPE that the API answers.  Raises LocaltunnelError."""
        status, data = self.open(method, path, value)
        return self.told(data, shape, status)

    def one(self, number: int, query: str = '') -> Any:
        """Return the exchange NUMBER.  Raises LocaltunnelError."""
        found = self.ask('GET', f'/api/exchanges/{number}{query}', SUMMARY)
        if not is_exchange(found):
            raise LocaltunnelError(NO_INSPECTOR)
        return found

    def exchanges(self, words: str, details: bool, follow: bool) -> Iterator[dict[str, Any]]:
        """Return the exchanges that fit WORDS, with DETAILS or as in a list."""
        query, seen = '?q=' + urllib.parse.quote(words), set()
        events = self.open('GET', '/api/events' + query, whole=False)[1] if follow else ()
        found = self.ask('GET', '/api/exchanges' + query, {'exchanges': [SUMMARY]})['exchanges']
        with contextlib.suppress(OSError):          # the client has ended
            for exchange in itertools.chain(found, (
                    self.told(line[6:], SUMMARY) for line in events if line[:7] == b'data: {')):
                if not (follow and exchange.get('pending')) and exchange['id'] not in seen:
                    seen.add(exchange['id'])
                    yield self.one(exchange['id']) if details else exchange


async def send_to(target: Target, tls: ssl.SSLContext | None, message: bytes) -> dict[str, Any]:
    """Send MESSAGE to TARGET; return what became of it, as a list shows that.

    It goes the way of all requests of a client, so it is connected, timed and explained alike.
    """
    runtime = Runtime(asyncio.get_running_loop())
    app = App(runtime, target, Upstreams(runtime, target, tls), ClientObserver(), Words())
    book = Exchanges(runtime, 0)
    Watched(book, app, '', '')
    await app.serve(Replay(runtime, message))       # type: ignore[arg-type]
    app.close()
    await runtime.close()
    return book.kept[0].summary()


def shown_line(exchange: dict[str, Any]) -> str:
    """Return EXCHANGE as a line of `logs`."""
    of = exchange.get('replay_of')
    tunnel = exchange.get('tunnel')
    return printable(f'{exchange["id"]}{f" {tunnel}" if tunnel else ""} {exchange["method"]} '
                     f'{exchange["target"]} '
                     f'{exchange["status"]} {exchange["ms"]}ms {exchange["response_bytes"]}B '
                     f'{exchange["at"][:19]}Z '
                     + exchange['error'] + (f' (a replay of {of})' if of else '')).rstrip()


def shown_sides(exchange: dict[str, Any], heads: bool) -> Iterator[str]:
    """Return the bodies of EXCHANGE line by line, of its request (>) and of its response (<).

    With HEADS those stand before them.
    """
    for side, sign in ((exchange['request'], '>'), (exchange['response'], '<')):
        if not side:
            continue
        lines = [side['line'], *map(': '.join, side['headers']), ''] if heads else []
        if side['encoding'] == 'utf-8':
            lines += side['body'].splitlines()
        else:
            with contextlib.suppress(BadHttp):      # in a file that is damaged
                size = len(body_of(side))
                lines.append(f'({size} bytes that are not text; --json has them)')
        for line in lines:
            yield f'  {sign} {printable(line.expandtabs())}'.rstrip()


def field_of(text: str) -> list[str]:
    """For argparse: 'NAME: VALUE'."""
    name, colon, value = text.partition(':')
    if not colon or not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not 'NAME: VALUE'")
    return [name.strip(), value.strip()]


def numbers_of(words: Sequence[str]) -> list[int]:
    """The numbers of exchanges that WORDS are; none where one of them is something else."""
    found = [re.fullmatch('#*([0-9]{1,15})', word) for word in words]
    return [int(match.group(1)) for match in found if match] if all(found) else []


MEANS_A_FILE = r'.*[.]jsonl|[.~]{1,2}/.*|[A-Za-z]:\\\\.*'        # /x may be the path of a request
LOGS_EPILOG = """examples:
  localtunnel.py logs 7                         number 7, with heads and bodies
  localtunnel.py logs --body method:post status:5xx
  localtunnel.py logs --follow slow:>500
  localtunnel.py logs --har traffic.jsonl"""

REPLAY_EPILOG = """examples:
  localtunnel.py replay 7
  localtunnel.py replay 7 --set-header "X-Debug: 1" --to 8001
  localtunnel.py replay traffic.jsonl --to 8000"""


class Inspect(Annex):
    """--inspect and --record, and the commands that read what they keep."""
    title = 'the inspector'
    for_all = True

    def client_options(self, add: Add) -> None:
        add('--inspect', type=host_and_port, metavar='[HOST:]PORT',
            help='show what passes at this address (127.0.0.1:4040, or the next free port)')
        add('--no-inspect', action='store_true', help='show nothing of what passes')
        add('--inspect-body', type=functools.partial(count, most=32 * KIB), metavar='KIB',
            default=KEPT_REQUEST // KIB,
            help='how much of a request is kept, to replay it (%(default)s)')
        add('--inspect-password', metavar='PASSWORD', help='what the inspector asks for')
        add('--record', metavar='FILE', help='append what passes to FILE, as lines of JSON')
        add('--record-secrets', action='store_true', help='do not mask secrets in that file')

    def at_client(self, args: Args, app: App, address: ServerAddress) -> None:
        host, port = args.inspect or ('127.0.0.1', INSPECTOR_PORT)
        if not args.inspect_password and not is_loopback(host):
            raise UsageError(
                f'--inspect on {host} needs --inspect-password; or leave it on this machine, and '
                f'look at it from another one through ssh -L {port}:localhost:{port} THIS-MACHINE')
        if args.record_secrets and not args.record:
            raise UsageError('--record-secrets needs --record FILE')
        told = getattr(args, 'on_exchange', None)       # a function, of who uses this from Python
        if not args.no_inspect or args.record or told:
            first = not isinstance(app.seen, Exchanges)
            book = Exchanges(app.runtime, args.inspect_body * KIB) if first else app.seen
            Watched(book, app, str(address), getattr(args, 'tunnel', ''))
            if told:
                book.listeners.append(functools.partial(self.tell_python, told))
            if args.record and first:
                Recorder(args.record, args.record_secrets, app)

    @staticmethod
    def tell_python(function: Callable[[Any], object], kept: Kept) -> None:
        """Call FUNCTION with KEPT, if it has ended."""
        if kept.seconds is not None:
            try:
                function(kept.as_object())
            except Exception:       # it is not ours, and must harm nothing
                logging.getLogger('localtunnel').exception('on_exchange failed')

    async def beside(self, args: Args, app: App, watched: Callable[[str], Any]) -> None:
        if args.no_inspect:
            return
        host, port = args.inspect or ('127.0.0.1', INSPECTOR_PORT)
        sockets = self.sockets(host, port, 1 if args.inspect else INSPECTOR_PORTS)
        port = sockets[0].getsockname()[1]
        where = '127.0.0.1' if host in ('', '0.0.0.0', '::') else host
        app.runtime.spawn(listen_on(
            app.seen, bracketed(host), sockets, config_path(os.path.join('inspectors', str(port))),
            {'host': where, 'port': port, 'password': args.inspect_password or ''}))
        watched(f'http://{authority("http", host, port)}')

    @staticmethod
    def sockets(host: str, port: int, tries: int) -> list[socket.socket]:
        """Bind PORT of HOST, or one of the next TRIES that is free.  Raises UsageError."""
        for tried in range(port, port + tries):
            try:
                return bind(host, tried)
            except OSError as e:
                why = str(e.strerror).partition(' (')[0]
        raise UsageError(f"the inspector can't listen on {host}, port {port}: {why}; choose "
                         'another one with --inspect, or none with --no-inspect')

    # The commands.

    def commands(self, add: Callable[..., argparse.ArgumentParser]) -> None:
        logs = add('logs', help='show what a client has seen, or what FILE has of it',
                   usage='%(prog)s [OPTION ...] [FILE] [FILTER ...]', epilog=LOGS_EPILOG)
        logs.add_argument('words', nargs='*', metavar='FILTER',
                          help='a FILE of --record; numbers of exchanges, to see them whole; '
                               'method:post status:5xx slow:>500 or any text')
        logs.add_argument('--json', action='store_true', help='one JSON object a line')
        logs.add_argument('--follow', '-f', action='store_true', help='go on with what comes')
        logs.add_argument('--body', action='store_true', help='with the bodies')
        logs.add_argument('--har', action='store_true', help='as an HTTP Archive (HAR 1.2)')
        replay = add('replay', help='send requests that were seen to the app again',
                     usage='%(prog)s [OPTION ...] [FILE] ID ...', epilog=REPLAY_EPILOG)
        replay.add_argument('words', nargs='+', metavar='ID',
                            help='numbers as in the log; after a FILE of --record, by default all')
        replay.add_argument('--set-header', type=field_of, action='append', default=[],
                            metavar="'NAME: VALUE'", help='with this field (repeatable)')
        replay.add_argument('--to', metavar='TARGET', help='send them to another app')
        for command, run in (logs, self.logs), (replay, self.replay):
            command.add_argument('--inspect', type=host_and_port, metavar='[HOST:]PORT',
                                 help="the inspector of a client (your newest client's)")
            command.add_argument('--inspect-password', metavar='PASSWORD',
                                 help='if that asks for one')
            command.set_defaults(run=run)

    @staticmethod
    def warn(text: str) -> None:
        """Tell the user of a command."""
        print(f'localtunnel.py: {printable(text)}', file=sys.stderr)

    def logs(self, args: Args) -> int:
        """Print exchanges."""
        if args.har and args.follow:
            raise UsageError('--har makes one document, which ends; leave --follow out')
        path = args.words.pop(0) if args.words and os.path.isfile(args.words[0]) else ''
        missing = next((word for word in args.words if re.fullmatch(MEANS_A_FILE, word)), '')
        if missing:
            raise UsageError(f'there is no file {printable(missing)}; logs takes one FILE, before '
                             'the words to look for')
        one = self._numbered(path, args)
        exchanges = one or self._fitting(path, args)
        if args.har:
            for piece in har_pieces(exchanges):
                print_line(piece)
            return 0
        shown = None
        with contextlib.suppress(*[KeyboardInterrupt] * args.follow):       # which is its end
            for shown in exchanges:
                print_line(json.dumps(shown) if args.json else shown_line(shown))
                if (one or args.body) and not args.json:
                    for line in shown_sides(shown, bool(one)):
                        print_line(line)
        if shown is None and not args.json:
            self.warn(f'no exchange fits {" ".join(args.words)}' if args.words else
                      'no exchange is there yet')
        return 0

    def _numbered(self, path: str, args: Args) -> list[dict[str, Any]]:
        """Return the exchanges whose numbers are all that ARGS say, if there are such."""
        numbers = numbers_of(args.words)
        if args.follow or not numbers:
            return []
        if path:
            return [e for e in recorded(path, False, self.warn) if e['id'] in numbers]
        remote = Remote(args.inspect, args.inspect_password)
        with contextlib.suppress(LocaltunnelError):     # it is text to look for
            return [remote.one(number) for number in numbers]
        return []

    def _fitting(self, path: str, args: Args) -> Iterator[dict[str, Any]]:
        """Return the exchanges that fit the words of ARGS.  Raises UsageError."""
        words, details = ' '.join(args.words), args.json or args.body or args.har
        try:
            chosen = Filter(words)
        except BadHttp as e:
            raise UsageError(str(e)) from e
        if not path:
            return Remote(args.inspect, args.inspect_password).exchanges(
                words, details, args.follow)
        return (e for e in recorded(path, args.follow, self.warn)
                if chosen.fits(e, functools.partial(dict, e)))

    def replay(self, args: Args) -> int:
        """Send requests again; return 1 if one was not answered by the app."""
        path = '' if numbers_of(args.words[:1]) else args.words.pop(0)
        if path and not os.path.exists(path):
            raise UsageError(f'replay takes numbers, as in the log; {path} is neither one nor a '
                             'file')
        numbers = numbers_of(args.words)
        if args.words and not numbers:
            raise UsageError('replay takes numbers, as in the log, after the file')
        if path and not args.to:
            raise UsageError('replay of a file needs --to TARGET, such as --to 8000')
        target = parse_target(args.to) if args.to else None
        there = ((e['id'], e) for e in (recorded(path, False, self.warn) if path else ()))
        found = [item for item in there if item[0] in numbers] if numbers else []
        last, times = dict(found), collections.Counter(number for number, _ in found)
        remote = None if path else Remote(args.inspect, args.inspect_password)
        failed = False
        for number, exchange in [(n, last.get(n)) for n in numbers] or there:
            if times[number] > 1:
                self.warn(f'{number}: several clients counted up to this; their last is sent')
            try:
                if target:
                    self._send_to(target, remote.one(number, '?secrets=1') if remote else exchange,
                                  args)
                elif remote:
                    answer = remote.ask('POST', f'/api/exchanges/{number}/replay', {'id': int},
                                        {'set_headers': args.set_header})
                    again = remote.one(answer['id'])
                    print_line(shown_line(again))
                    failed = failed or again['error'] != '' or not again['status']
            except LocaltunnelError as e:
                self.warn(f'{number}: {e}')
                failed = True
        return int(failed)

    def _send_to(self, target: Target, exchange: Any, args: Args) -> None:
        """Send EXCHANGE to TARGET, and print the status of the answer.  Raises LocaltunnelError."""
        why = not_replayable(exchange) if exchange else 'there is no such exchange in the file'
        if why:
            raise LocaltunnelError(why)
        edited = Edited(exchange, {'set_headers': args.set_header})
        if edited.left_out:
            self.warn(f'{exchange["id"]}: without what the record masks: '
                      + ', '.join(edited.left_out))
        if target.port:
            edited.target = target.path + edited.target
        sent = asyncio.run(send_to(target, tls_to(target, check=not target.local),
                                   edited.message(exchange['id'])))
        if sent['error']:
            raise LocaltunnelError(sent['error'])
        print_line(shown_line({**sent, **{name: exchange.get(name)
                                          for name in ('id', 'tunnel', 'replay_of')}}))


# ------------------------------------------------------------------------------------------------
# 55. Words from elsewhere
#
# What people type who know ngrok, frp, bore, or the localtunnel of npm, said in the words that are
# used here.  It is looked at only once the words were not understood.
# ------------------------------------------------------------------------------------------------

CODE_WORDS = {'join', 'login', 'auth', 'authtoken', 'config'}
FIRST_WORDS = {'http': ['client'], 'start': ['client'], 'share': ['client'], 'expose': ['client'],
               'tunnel': ['client'], 'tcp': ['client', '--tcp'], 'local': ['client', '--tcp'],
               'relay': ['server'], 'unblock': ['block', '--remove']}

# An option there, and what it is here: an option; TARGET or HOST, if its value is the target or its
# host; FLAG or VALUE, if it is left out, alone or with its value.
TARGET, HOST, FLAG, VALUE = 'TARGET', 'HOST', 'FLAG', 'VALUE'
CLIENT_WORDS = {
    '--port': TARGET, '-p': TARGET, '--local-port': TARGET, '--local-host': HOST, '-l': HOST,
    '--name': '--name', '--subdomain': '--name', '-s': '--name', '--hostname': '--name',
    '--url': '--name', '--domain': '--name', '-n': '--name', '--host': '--server',
    '--to': '--server', '--server-addr': '--server', '--authtoken': '--token',
    '--secret': '--token', '-t': '--token', '--basic-auth': '--auth', '--cidr-allow': '--allow',
    '--remote-port': '--tcp-port', '--allow-invalid-cert': '--insecure', '-v': '--verbose',
    '-q': '--quiet', '--print-requests': FLAG, '-o': FLAG, '--open': FLAG, '--region': VALUE}
SERVER_WORDS = {
    '--domain': '--domain', '-d': '--domain', '--hostname': '--domain', '-p': '--port',
    '--host': '--bind', '--address': '--bind', '--secret': '--token', '-t': '--token',
    '-v': '--verbose'}


def translated(words: Sequence[str], table: dict[str, str],
               note: Callable[[str], Any]) -> tuple[list[str], dict[str, str]]:
    """(WORDS, with the options of TABLE as they are here; the TARGET and HOST among them)."""
    queue, said, found = collections.deque(words), [], {}
    while queue:
        word = queue.popleft()
        option, equals, value = word.partition('=')
        here = table.get(option)
        if here is None:
            said.append(word)
            continue
        if equals:
            queue.appendleft(value)
        if here.startswith('-'):
            said.append(here)
        elif here != FLAG and queue:
            found[here] = queue.popleft()
        if here != option:
            note(f'{option} is {here} here' if here.startswith('-')
                 else f'leave {option} out')
    return said, found


def bare(words: list[str], option: str, note: Callable[[str], Any]) -> None:
    """Make the value of OPTION a name, where it is a URL or a name with a domain."""
    for i in [i for i, word in enumerate(words[:-1]) if word == option]:
        match = re.fullmatch(r'(?:\w+://)?(?:\*\.)?([^:/]*?)[.]?(?:[:/].*)?', words[i + 1])
        name = match.group(1) if match else words[i + 1]
        if option == '--name':
            name = name.partition('.')[0].replace('_', '-')
        if name != words[i + 1]:
            note(f'{option} takes a name ' + (
                'such as shop-2' if option == '--name' else 'such as t.example.com'))
            words[i + 1] = name


def with_code(words: Sequence[str], note: Callable[[str], Any]) -> list[str]:
    """WORDS after `client`, with a code that stands among them at the end, behind --join."""
    code = next((word for word in words if CODE.fullmatch(word)), '')
    if not code:
        return list(words)
    if '--join' not in words:
        note('say --join before a code')
    return [*(word for word in words if word not in (code, '--join')), '--join', code]


def meant_target(typed: str, found: dict[str, str], note: Callable[[str], Any]) -> str:
    """The target that was TYPED, or is among what was FOUND."""
    port, host = found.get(TARGET, ''), found.get(HOST, '')
    if port and typed != port:
        host = host or typed            # localhost --port 8000
    target = f'{host}:{port or typed}' if host else port or typed
    if os.path.isfile(target):
        note(f'{target} is a file: give its folder a URL, and visit /{os.path.basename(target)}')
        return os.path.dirname(target) or '.'
    if re.match('https?://.*[?]', target):
        note('visitors add path and query by themselves')
        return '/'.join(target.split('/')[:3])
    if re.fullmatch(r'localhost|[\w-]+(\.[\w-]+)+', target) and not os.path.exists(target):
        note(f'{target} needs a port')
        return target + ':8000'
    return target


def client_words(words: Sequence[str], note: Callable[[str], Any]) -> list[str]:
    """WORDS after `client`."""
    import difflib
    rest, found = translated(with_code(words, note), CLIENT_WORDS, note)
    if rest[1:] and rest[0] in FIRST_WORDS and not rest[1].startswith('-'):
        first = rest.pop(0)
        note(f'say client without {first}')
        rest += FIRST_WORDS[first][1:]
    bare(rest, '--name', note)
    for i in reversed(range(len(rest) - 2)):
        if rest[i] == '--keep' and rest[i + 2].startswith('/'):
            note('--keep takes one word, in quotes')
            rest[i + 1:i + 3] = [' '.join(rest[i + 1:i + 3])]
    typed = rest.pop(0) if rest and not rest[0].startswith('-') else ''
    target = meant_target(typed, found, note)
    if not (target or any(difflib.get_close_matches(word.partition('=')[0], ['--config'])
                          for word in rest)):
        note('say what is to get a URL, such as the port of your app, or --help')
        target = '8000'
    elif rest and not rest[0].startswith('-'):
        note('say -- before a command')
        rest.insert(0, '--')
    return [*[target] * bool(target), *rest]


def server_words(words: Sequence[str], note: Callable[[str], Any]) -> list[str]:
    """WORDS after `server`."""
    rest, _ = translated(words, SERVER_WORDS, note)
    if rest and not rest[0].startswith('-'):
        rest.insert(0, '--port' if rest[0].isdigit() else '--domain')
        note(f'say {rest[0]} before {rest[1]}')
    bare(rest, '--domain', note)
    return rest


class Elsewhere(Annex):
    """Says in our words what was said in others'."""

    def meant(self, words: Sequence[str], note: Callable[[str], Any]) -> Sequence[str]:
        first, *rest = words or ['client']
        if first in CODE_WORDS:
            note('the code that a server prints lets you in')
            return ['client', '8000', '--join', *(word for word in rest if CODE.fullmatch(word))]
        if first in FIRST_WORDS:
            note(f'{first} is {" ".join(FIRST_WORDS[first])} here')
            first, *more = FIRST_WORDS[first]
            rest += more
        elif re.match('-|localhost|.*[0-9:/]', first) or os.path.exists(first):
            note('the first word is client or server')
            first, rest = 'client', [first, *rest]
        if rest and rest[0].endswith('.ini') and os.path.isfile(rest[0]):
            note('say --config before a configuration file')
            rest.insert(0, '--config')
        if first == 'client':
            return [first, *client_words(rest, note)]
        return [first, *(server_words(rest, note) if first == 'server' else rest)]


# ------------------------------------------------------------------------------------------------
# 56. Error pages
#
# What a browser is shown where something fails: the way of the request, and where it stops.  It
# says nothing that text and JSON do not say, and what helps the owner; nothing in it runs.
# ------------------------------------------------------------------------------------------------

HEADLINES = {
    ('app', 502): 'The app does not answer', ('app', 504): 'The app took too long',
    ('client', 502): 'The tunnel broke', ('client', 503): 'This site is not connected',
    ('client', 504): 'The client does not answer', ('relay', 400): "This request can't be read",
    ('relay', 401): 'A password is needed', ('relay', 403): 'You may not come in',
    ('relay', 404): 'Nothing is here', ('relay', 408): 'The request took too long',
    ('relay', 410): 'This site was ended',
    ('relay', 414): 'This address is too long', ('relay', 429): 'Too many requests',
    ('relay', 431): 'This request is too large', ('relay', 503): 'The server is busy',
    ('relay', 508): 'This tunnel leads to itself'}
WAY = (('you', 'you'), ('relay', 'server'), ('client', 'client'), ('app', 'app'))
MARKS = {'works': '&#10003;', 'stops here': '&#10005;', 'not asked': '&middot;'}
ERROR_TEXT = """<style>
ol {{ display: flex; list-style: none; margin: 1.5em 0 1.75em; padding: 0; text-align: center }}
li {{ flex: 1; position: relative; font-weight: 600 }}
li + li::before {{ content: ""; position: absolute; top: 1.1em; right: calc(50% + 1.5em);
left: calc(-50% + 1.5em); border-top: 2px solid var(--line) }}
li b {{ display: block; width: 2.2em; height: 2.2em; margin: 0 auto .4em; border: 2px solid;
border-radius: 50%; line-height: 2em }}
li small {{ display: block; font-weight: 400 }}
.works b {{ color: var(--good) }} .stops b, .stops small {{ color: var(--bad) }}
li.works::before, li.stops::before {{ border-color: var(--good) }}
.not, .works small {{ color: var(--dim) }} .not b {{ border-style: dashed }}
.owner {{ border-left: 3px solid var(--line); padding-left: 1em }}
footer {{ display: flex; flex-wrap: wrap; gap: 0 1.5em; color: var(--dim); font-size: .85em;
margin-top: 2em }}
</style>
<ol>{way}</ol><p>{text}</p>{owner}
<footer><span>{code}</span><span>{time} UTC</span><span>{operator}</span></footer>"""


def sentence(text: str) -> str:
    """TEXT as a sentence of a page; what begins with a name keeps its case."""
    text = printable(text)
    first = text[:1].upper() if re.match('[a-z]+ ', text) else text[:1]
    return html.escape(first + text[1:]) + '.'


def error_page(error: HopFailed, contact: str = '') -> str:
    """The page about ERROR, at a server whose operator has this CONTACT."""
    way, state = [], 'works'
    for hop, name in WAY:
        if state != 'works':
            state = 'not asked'
        elif hop == error.hop:
            state = 'stops here'
        way.append(f'<li class="{state}"><b aria-hidden="true">{MARKS[state]}</b>{name}'
                   f'<small>{state}</small></li>')
    code = f'{error.status} {http.HTTPStatus(error.status).phrase}'
    later = ' Please try again later.' if error.status in (502, 504) else ''
    text = ERROR_TEXT.format(
        way=''.join(way), text=sentence(str(error)) + later, code=code,
        owner=error.cure and f'<p class="owner">Is this yours? {sentence(error.cure)}</p>',
        time=time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime()),
        operator=f'operator: {html.escape(contact)}' if contact else 'localtunnel')
    return PAGE.format(title=HEADLINES.get((error.hop, error.status), code), text=text)


class ErrorPages(Annex):
    """The pages of both ends."""

    def at_client(self, args: Args, app: App, address: ServerAddress) -> None:
        app.words.page = error_page

    async def at_server(self, args: Args, server: Server) -> None:
        contact = getattr(args, 'contact', None) or ''
        server.pages.page = functools.partial(error_page, contact=contact)


# ------------------------------------------------------------------------------------------------
# 57. Setting up
#
# A server on a machine of its own: `install` writes what it takes there, and starts it; `deploy`
# has that done through the user's own ssh program.  What is done as root stands here as the files
# and the shell's lines that both can show.
# ------------------------------------------------------------------------------------------------

FOLDER, STATE = '/usr/local/lib/localtunnel', '/var/lib/localtunnel'
PROGRAM, CONFIG = f'{FOLDER}/localtunnel.py', '/etc/localtunnel/server.ini'
USER_FILE, SYSTEMD = '/etc/sysusers.d/localtunnel.conf', '/run/systemd/system'
SOCKET, SERVICE = (f'/etc/systemd/system/localtunnel.{kind}' for kind in ('socket', 'service'))
USUAL_PYTHON = '/usr/bin/python3'

SOCKET_UNIT = """[Unit]
Description=Ports of the localtunnel server

[Socket]
{ports}
BindIPv6Only=ipv6-only
Backlog=1024

[Install]
WantedBy=sockets.target
"""
HARDENED = ('LockPersonality MemoryDenyWriteExecute NoNewPrivileges PrivateDevices PrivateTmp '
            'ProtectClock ProtectControlGroups ProtectHome ProtectHostname ProtectKernelLogs '
            'ProtectKernelModules ProtectKernelTunables RemoveIPC RestrictNamespaces '
            'RestrictRealtime RestrictSUIDSGID').replace(' ', '=yes\n')
SERVICE_UNIT = f"""[Unit]
Description=localtunnel server
Wants=network-online.target
After=network-online.target localtunnel.socket
Requires=localtunnel.socket

[Service]
Type=notify
NotifyAccess=all
WorkingDirectory={FOLDER}
ExecStart={{python}} -m localtunnel server --config {CONFIG}
ExecReload=/bin/kill -USR2 $MAINPID
Restart=always
RestartSec=2
TimeoutStopSec=45
LimitNOFILE=65536

User=localtunnel
StateDirectory=localtunnel
StateDirectoryMode=0700
UMask=0077
AmbientCapabilities=CAP_NET_BIND_SERVICE
CapabilityBoundingSet=CAP_NET_BIND_SERVICE
DevicePolicy=closed
ProcSubset=pid
ProtectProc=invisible
ProtectSystem=strict
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
SystemCallArchitectures=native
SystemCallErrorNumber=EPERM
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
{HARDENED}=yes

[Install]
WantedBy=multi-user.target
"""

IS_ACTIVE, LISTENERS = 'systemctl is-active localtunnel.service', 'ss -Hlntup'
# Python keeps what it has compiled beside the program, where the server may not write: with that it
# needs half of the memory.
PREPARE = f"""systemd-sysusers {USER_FILE}
chgrp localtunnel {CONFIG}
{{python}} -m py_compile {PROGRAM}
systemctl daemon-reload"""
START = 'systemctl enable --now localtunnel.socket localtunnel.service'
STOP = START.replace('enable', 'disable')
HAND_OVER = 'systemctl reload localtunnel.service'
UNIT_LOG = 'journalctl -u localtunnel.service -u localtunnel.socket -o cat --since=@'
REMOVAL = f"""[ ! -e {SERVICE} ] || {STOP}
rm -rf {FOLDER} {SOCKET} {SERVICE} {CONFIG} {USER_FILE}
rmdir {os.path.dirname(CONFIG)} 2>/dev/null || true       # files of your own stay
systemctl daemon-reload"""
PURGE_TOO = f"""
rm -rf {STATE}
userdel localtunnel || true"""
WHAT_IS_DONE = f"""{{files}}
# All that it runs, first to look:
{IS_ACTIVE}
{LISTENERS}
# With these files in place:
{PREPARE}
{START}
# Or, where it runs already:
{HAND_OVER}
# With other ports, before the start:
{STOP}
# And until it serves:
{UNIT_LOG}NOW

# Without systemd all this is for you to do. With OpenRC, once there is a user localtunnel
# (adduser -S -H localtunnel), as /etc/init.d/localtunnel:
#!/sbin/openrc-run
export STATE_DIRECTORY={STATE}
command={{python}} command_args="-m localtunnel server --config {CONFIG}" directory={FOLDER}
command_background=yes
command_user=localtunnel capabilities=^cap_net_bind_service
pidfile=/run/localtunnel.pid error_log=/var/log/localtunnel.log
depend() {{{{ need net; }}}}
start_pre() {{{{ checkpath -d -m 700 -o localtunnel {STATE}; }}}}

# With Docker:
docker run -d --restart unless-stopped -p 80:80 -p 443:443 -v localtunnel:/state \\
  -e STATE_DIRECTORY=/state -v "$PWD/localtunnel.py:/localtunnel.py:ro" python:3-slim \\
  python3 /localtunnel.py server {{words}}"""


def words_of(args: Args) -> list[str]:
    """The server's options among those that were typed, and those of a file that was named."""
    own, words = ('--config', '--dry-run', '--print', '--purge', '--remove'), {}
    for word in args.typed:
        name = word.partition('=')[0]
        repeats = isinstance(getattr(args, name[2:].replace('-', '_'), None), list)
        if name not in own:
            words[word if repeats else name] = word     # the last one wins
    return [*words.values()]


def in_file(words: Sequence[str]) -> str:
    """The options WORDS of a server, as a configuration file.  Raises UsageError."""
    values: dict[str, list[str]] = {}
    for word in words:
        key, equals, value = word[2:].partition('=')
        if re.search(r'''(^|\s)[#;]|^\s|\s$|[\r\n]|^(["']).*\2$''', value):
            raise UsageError(f"--{key} {value!r} can't stand in the file of an installed server")
        values.setdefault(key, []).append(value if equals else 'yes')
    lines = (f'{key} = ' + '\n    '.join(several) for key, several in values.items())
    return '\n'.join(['[server]', *lines, ''])


def ports_of(args: Args) -> list[int]:
    """The ports of a server with the options ARGS."""
    # Without openssl it makes no certificate of its own; of another machine that is not known.
    secure = any(getattr(args, name, None) for name in ('cert', 'acme')) or (
        not args.trust_proxy and (args.command == 'deploy' or shutil.which('openssl')))
    return [80 if args.port is None else args.port, *([args.tls_port] if secure else [])]


def server_files(args: Args, words: Sequence[str], python: str) -> dict[str, bytes]:
    """All files of a server with the options WORDS, which mean ARGS."""
    any_host = ['0.0.0.0', '[::]'][:1 + os.path.exists('/proc/net/if_inet6')]
    hosts = [bracketed(args.bind.strip('[]'))] if args.bind else any_host
    ports = [f'ListenStream={host}:{port}' for port in ports_of(args) for host in hosts]
    texts = {
        USER_FILE: 'u localtunnel - "localtunnel server"\n',
        CONFIG: '# After a change: systemctl reload localtunnel\n' + in_file(words),
        SOCKET: SOCKET_UNIT.format(ports='\n'.join(ports)),
        SERVICE: SERVICE_UNIT.format(python=python)}
    return {PROGRAM: original(), **{path: text.encode() for path, text in texts.items()}}


def shown(args: Args, words: Sequence[str], python: str) -> str:
    """What `install` does as root, and what is to be done without systemd."""
    import shlex
    if args.remove:
        return REMOVAL + (PURGE_TOO if args.purge else '')
    files = {**server_files(args, words, python), PROGRAM: b'(this file)\n'}
    return WHAT_IS_DONE.format(python=python, words=shlex.join(words), files='\n'.join(
        f'# {path}\n{text.decode()}' for path, text in files.items()))


COMMAND_PATIENCE = 120.0        # for the system's commands; systemd gives a server 90
READY_WITHIN, READY_LOOK = 60.0, 0.3    # for a successor to serve; between looks


def system(*words: str) -> str:
    """Run WORDS, or a few lines for the shell; return what they print.  Raises LocaltunnelError."""
    import subprocess
    if len(words) == 1:
        words = ('sh', '-ec', *words)
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              errors='replace', timeout=COMMAND_PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise LocaltunnelError(f"{words[-1]} does not run: {printable(str(e))}") from e
    if done.returncode:
        said = [f'{words[-1]} ended with {done.returncode}', *done.stderr.strip().splitlines()]
        raise LocaltunnelError(printable(said[-1]))
    return done.stdout.strip()


def asked(*words: str) -> str:
    """The same; '' where they fail."""
    with contextlib.suppress(LocaltunnelError):
        return system(*words)
    return ''


def contents(path: str) -> bytes:
    """What is in the file at PATH; nothing where there is none."""
    with contextlib.suppress(FileNotFoundError), open(path, 'rb') as f:
        return f.read()
    return b''


def state_of(port: int, kind: str) -> str:
    """What is known of PORT; of UDP only what is for strangers counts."""
    for line in asked(LISTENERS).splitlines():
        if re.match(rf'{kind}\s.*:{port}\s', line) and not (
                kind == 'udp' and re.search(r'\s(127\.\S+|\[::1\]):\d+\s', line)):
            match = re.search(r'users:\(\("([^"]+)"', line)
            return 'used by ' + (printable(match.group(1)) if match else 'another program')
    return 'free' if shutil.which('ss') else 'not looked at, since ss is not installed'


def need_root() -> None:
    """Raises LocaltunnelError where nothing can be installed."""
    if not os.path.isdir(SYSTEMD):
        raise LocaltunnelError('systemd does not run here; `install --print` ends with what to do '
                               'instead, with OpenRC or Docker')
    if not os.access(SYSTEMD, os.W_OK):
        raise LocaltunnelError('this takes root, so type sudo before it')


def look(args: Args, running: bool) -> str:
    """What this machine has for a server with the options ARGS.  Raises LocaltunnelError."""
    name = re.search(rb'(?m)^PRETTY_NAME="?([^"\n]+)', contents('/etc/os-release'))
    facts = [(name.group(1).decode(errors='replace') if name else sys.platform) + ' with systemd',
             f'Python {sys.version.split()[0]}', 'sudo' if 'SUDO_UID' in os.environ else 'root',
             ' and '.join(outward_addresses()) or 'no address that others reach']
    ours = contents(SOCKET) if running else b''
    for port in ports_of(args):
        state = 'ours' if b':%d\n' % port in ours else state_of(port, 'tcp')
        if state.startswith('used'):
            raise LocaltunnelError(
                f'port {port} is {state}; stop that, or let it pass requests on (README, "A proxy '
                'in front"), or choose another one with --port and --tls-port')
        facts.append(f'port {port} is {state}')
    if not args.trust_proxy and args.tls_port not in ports_of(args):
        facts.append(f'port {args.tls_port} stays closed, since openssl is not installed')
    if getattr(args, 'acme', None) and not running:
        state = state_of(args.dns_port, 'udp')
        facts.append(f'port {args.dns_port}, for DNS, is {state}'
                     + ', so names get no https' * state.startswith('used'))
    return printable('; '.join(facts))


ITS_FILES = {'--cert', '--key', '--token-file', '--acme-ca', '--cluster-key'}     # it reads them


def check(args: Args, python: str) -> None:
    """Raise UsageError for options that an installed server can't have."""
    whole = '/(?!home/|root/)'
    given = [word.partition('=')[::2] for word in words_of(args)]
    for wrong, why in (
            (args.purge, '--purge goes with --remove'),
            (python.startswith(('/home/', '/root/')),
             f"homes are hidden from the server, so it can't run {python}; use the system's "
             'Python'),
            (is_loopback(args.domain),
             'add --domain DOMAIN: a name that leads to the server, or its address'),
            (args.state, f'an installed server keeps its state in {STATE}; leave out --state'),
            (args.bind and not is_address(args.bind),
             f'--bind takes an address here, not {args.bind!r}'),
            *((option in ITS_FILES and not re.match(whole, path),
               f'{option} needs a whole path here, and not one in a home, which the server does '
               f'not see, such as /etc/localtunnel/{os.path.basename(path)}')
              for option, path in given)):
        if wrong:
            raise UsageError(why)


def write_files(files: dict[str, bytes]) -> dict[str, bytes]:
    """Write those FILES that differ from what is there; return that."""
    before = {path: contents(path) for path in files}
    changed = {path: text for path, text in before.items() if text != files[path]}
    for path in changed:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_secret(path, files[path])
        os.chmod(path, 0o640 if path == CONFIG else 0o644)
    return changed


def start(running: bool, changed: Container[str]) -> None:
    """Let the server run as its files say, of which some have CHANGED.  Raises LocaltunnelError."""
    served, log = f'{STATE}/{SERVED}', f'{UNIT_LOG}{time.time():.0f}'
    before, deadline, why = stamp_of(served), time.monotonic() + READY_WITHIN, ''
    try:
        if running and SOCKET in changed:
            system(STOP)
        system(HAND_OVER if running and SOCKET not in changed else START)
    except LocaltunnelError as e:
        why = str(e)            # the log may know better
    while stamp_of(served) in ([], before):
        said = re.search(r'(?m)^localtunnel\.(?:py: |socket: (?=Failed to ))(.*)', asked(log))
        if said or why or time.monotonic() > deadline:
            why = printable(said.group(1)) if said else why or 'see `journalctl -u localtunnel`'
            raise LocaltunnelError(f'the server does not start: {why}')
        time.sleep(READY_LOOK)


# On another machine.

# What a shell does there: it takes this file and the options of the server (there may be secrets in
# them, and all can see what runs), finds a Python that can run it, and lets it install.
REMOTELY = """set -e
umask 077
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
head -c {whole} >"$folder/given"
head -c {size} "$folder/given" >"$folder/localtunnel.py"
tail -c +{next} "$folder/given" >"$folder/server.ini"
for python in {pythons} ""; do
    "$python" -c "import asyncio, ssl, sys; sys.exit(sys.version_info < (3, 8))" && break
done >/dev/null 2>&1
if [ ! "$python" ]; then echo "it lacks Python 3.8 or later; install python3"; exit 1; fi
set -- "$python" "$folder/localtunnel.py" install {words}
if [ "$(id -u)" = 0 ]; then "$@"
elif ! command -v sudo >/dev/null; then echo "it lacks sudo; log in as root"; exit 1
elif sudo -n true >/dev/null 2>&1; then sudo -n "$@"
else echo "{question}"; sudo -S -p "" "$@"
fi"""
WITH_THESE = '--config "$folder/server.ini"'
WITH_THE_OLD = f'$([ -e {CONFIG} ] || echo --config "$folder/server.ini")'     # if any
PYTHONS = USUAL_PYTHON, 'python3', *(f'python3.{minor}' for minor in range(14, 7, -1))
QUESTION = 'password?'          # the line by which it asks for one, for sudo
# A shared connection may be used, but none begun: it would keep the pipe of what is printed open.
SSH = 'ssh', '-o', 'ConnectTimeout=20', '-o', 'ServerAliveInterval=20', '-o', 'ControlMaster=no'
NAME_OF = 'ssh', '-G', '--'     # and HOST: what the user's settings make of it
DEPLOYED_WITHIN = 900.0         # people look for second factors; the parts have their own deadlines
MOST_HEARD = 64 * KIB           # of the other machine; ours say a few lines


def converse(process: Any, given: bytes, host: str) -> Iterator[str]:
    """What PROCESS on HOST prints, which reads GIVEN, and a password where it asks for one."""
    def say(data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):      # then it says why
            process.stdin.write(data)
    say(given)
    left = MOST_HEARD
    while left > 0:
        line = process.stdout.readline(left)
        left -= len(line) or left
        text = printable(line.decode(errors='replace').rstrip())
        if text == QUESTION:
            password = ask(f'password for sudo on {host}: ')
            if not password:
                raise LocaltunnelError(f'sudo on {host} asks for a password; type it on a '
                                       'terminal, or log in as root')
            say(f'{password}\n'.encode())
            process.stdin.close()
        elif text:
            yield text


def over_ssh(host: str, script: str, given: bytes) -> Iterator[str]:
    """Run SCRIPT, which reads GIVEN, on HOST; what is said there.  Raises LocaltunnelError."""
    import shlex
    import subprocess
    words, last = [*SSH, '--', host, shlex.join(['sh', '-c', script])], ''
    try:
        process = subprocess.Popen(words, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT)
    except OSError as e:
        raise LocaltunnelError(f"can't run ssh ({plainly(e)}); install the client of OpenSSH"
                               ) from e
    timer = threading.Timer(DEPLOYED_WITHIN, process.kill)
    timer.start()
    try:
        with process:
            try:
                for line in converse(process, given, host):
                    if last:
                        yield last
                    last = line
            except BaseException:
                process.kill()
                raise
    finally:
        timer.cancel()
    code, last = process.returncode, last.replace('localtunnel.py: ', '', 1).rstrip('.')
    if code == 255:
        raise LocaltunnelError(f"can't reach {host}: {last or 'ssh does not say why'}; `ssh {host}`"
                               ' alone may say more')
    if code < 0:
        raise LocaltunnelError(f'{host} was not done within {DEPLOYED_WITHIN:.0f} seconds, or ssh '
                               'was killed; the same command again finishes what has begun')
    if code:
        raise LocaltunnelError(f'on {host}: {last}')
    if last:
        yield last


def domain_of(host: str, acme: bool) -> str:
    """What stands for a domain of HOST: its address, or that as a name, where it gets https."""
    name = re.search(r'(?m)^hostname (\S+)$', asked(*NAME_OF, host))
    try:
        found = socket.getaddrinfo(name.group(1) if name else host.rpartition('@')[2], None,
                                   type=socket.SOCK_STREAM)
    except OSError as e:
        raise UsageError(f'{host} has no address that is known here; add --domain DOMAIN') from e
    address = min((str(place[0]) for *_, place in found), key=lambda text: ':' in text)
    if acme and ipaddress.ip_address(address).is_global:
        return re.sub('[.:]', '-', address) + '.sslip.io'
    return address


INSTALL_EPILOG = """Options of the server follow; they are kept in /etc/localtunnel/server.ini.
Again is an upgrade: without options it keeps those, with some it has these alone.

examples:
  localtunnel.py install --domain t.example.com --acme you@example.com --print
  localtunnel.py install --remove           leases and token stay"""
DEPLOY_EPILOG = """It runs `install` there, by your ssh program. Without --domain the domain is the
address, or with --acme its name at sslip.io.

examples:
  localtunnel.py deploy root@HOST --domain t.example.com --acme you@example.com
  localtunnel.py deploy root@HOST --remove          leases and token stay"""


class SettingUp(Annex):
    """`install` and `deploy`."""

    def commands(self, add: Callable[..., argparse.ArgumentParser]) -> None:
        for name, where, epilog, run, text in (
                ('install', '', INSTALL_EPILOG, self.install, 'run the server by systemd'),
                ('deploy', ' [USER@]HOST', DEPLOY_EPILOG, self.deploy,
                 'do that on another machine, by ssh')):
            parser = add(name, like='server', epilog=epilog, help=text,
                         usage=f'%(prog)s{where} [OPTION ...]')
            parser.set_defaults(run=run)
            option = parser.add_argument_group(name).add_argument
            option('--remove', action='store_true', help='take the server away')
            option('--purge', action='store_true', help='with --remove: leases and token, too')
            if name == 'install':
                option('--print', action='store_true', help='print what it would do, for root')
            else:
                parser.add_argument('host', metavar='[USER@]HOST', help='a machine, as for ssh')
                option('--dry-run', action='store_true', help='print what it would do')

    def install(self, args: Args) -> int:
        """Do what ARGS say; return the exit code."""
        words, here = words_of(args), os.path.realpath(sys.executable)
        if not (words or args.remove or args.config) and os.path.exists(CONFIG):
            return int(args.do(['install', f'--config={CONFIG}', *['--print'] * args.print]))
        python = USUAL_PYTHON if here == os.path.realpath(USUAL_PYTHON) else here
        if not args.remove:
            check(args, python)
        if args.print:
            print_line(shown(args, words, python))
            return 0
        need_root()
        if args.remove:
            system(shown(args, words, python))
            print_line('the server is gone' + '; its leases and token are still in '
                       f'{STATE}' * (not args.purge))
        else:
            files = server_files(args, words, python)
            if args.config == CONFIG:
                del files[CONFIG]       # it stays as it is, with its comments
            self.set_up(args, files, PREPARE.format(python=python))
        return 0

    @staticmethod
    def set_up(args: Args, files: dict[str, bytes], prepare: str) -> None:
        """Let the server run that FILES describe, after the commands that PREPARE it."""
        running = asked(IS_ACTIVE) == 'active'
        print_line(look(args, running))
        os.umask(0o022)
        before = write_files(files)
        try:
            system(prepare)
            if before or not running:
                start(running, before)
        except LocaltunnelError as e:
            if not running:
                raise
            write_files(before)
            asked('\n'.join([prepare, *[STOP] * (SOCKET in before), START]))     # its ports, too
            raise LocaltunnelError(f'{e}; the old one goes on') from e
        if running and SERVICE in before and SOCKET not in before:
            print_line('for what is new in its unit: systemctl restart localtunnel')
        print_line('the server runs; its log: journalctl -u localtunnel')
        served, token = Served(STATE), (args.token or [''])[0]
        if not (args.token or getattr(args, 'token_file', None)):
            token = contents(f'{STATE}/token').decode('ascii', 'replace').strip()
        code = make_code(served.address, '' if served.open else token, served.pin)
        print_line(f'to connect: python3 localtunnel.py client 8000 --join {code}')

    def deploy(self, args: Args) -> int:
        """Do what ARGS say; return the exit code."""
        import shlex
        words, lines = words_of(args), [shlex.join([*SSH, '--', args.host])]
        which = WITH_THESE if words else WITH_THE_OLD
        if is_loopback(args.domain) and not args.remove:
            args.domain = domain_of(args.host, bool(getattr(args, 'acme', None)))
            words.append(f'--domain={args.domain}')
            lines.insert(0, shlex.join([*NAME_OF, args.host]) + '   # for the domain')
        source, options = original(), in_file(words).encode()
        script = REMOTELY.format(
            size=len(source), next=len(source) + 1, whole=len(source + options),
            pythons=' '.join(PYTHONS), question=QUESTION,
            words=' '.join(['--remove'] * args.remove + ['--purge'] * args.purge)
            or which)
        if not args.remove:
            check(args, USUAL_PYTHON)
        if args.dry_run:
            print_line('\n'.join(lines) + '   # runs this, and reads this file and the options:\n'
                       f'{script}\n\n# What install does there, as root:\n'
                       + shown(args, words, USUAL_PYTHON))
            return 0
        print_line(f'{args.host}:')
        code = ''
        for line in over_ssh(args.host, script, source + options):
            told, _, code = line.partition('--join ')
            if not code:
                print_line(f'  {told}')
        if not code:
            return 0
        address = read_code(code)[0]
        args.remember(code)
        wrong = 'doctor' in args.known and args.do(['doctor', '--server', address])
        named = STAMPED_SERVER or os.environ.keys() & {'LOCALTUNNEL_SERVER', 'LOCALTUNNEL_JOIN'}
        print_line('type this, with the port of your app: python3 localtunnel.py client 8000'
                   + (f' --server {address}' if named else ''))
        return int(wrong)


# ------------------------------------------------------------------------------------------------
# 58. Via ssh
#
# A public URL without a server: the user's own ssh, with their keys, agent and settings, has a
# machine elsewhere forward visitors (ssh -R) to the server in this process, which stands in front
# of the app as ever.  That machine sees what passes, so nobody is asked who was not named.
# ------------------------------------------------------------------------------------------------

class Service(NamedTuple):
    """How an sshd is asked to forward, and where it says what the URL is."""
    port: str               # as ssh -R takes it
    before: str             # stands before the URL, or before the port; other URLs may come first
    names: bool = False     # it gives chosen names
    tells: bool = False     # it is known to say who a visitor is: X-Forwarded-For is believed


SERVICES = {'srv.us': Service('1', '1: '), 'localhost.run': Service('80', 'tls termination, '),
            'serveo.net': Service('80', 'HTTP traffic from ', names=True),
            'tuns.sh': Service('80', 'HTTPS: ', names=True, tells=True),
            'pinggy.io': Service('0', '^', tells=True)}
# Of any other sshd ssh itself tells: which port, and once it is known, that it may have it again.
PLAIN = Service('0', '(?:Allocated port |remote forward success for: listen .*:)')

HEARD = re.compile('debug1: Connecting to (?P<to>[^ ]+) .*port (?P<port>[0-9]+)|'
                   'debug1: Server host key: (?P<key>.+)|(?P<new>Warning: Permanently added )|'
                   '(debug1: )?Authenticated to (?P<host>[^ ]+) |debug1: |OpenSSH_|Allocated port |'
                   'Transferred: |Bytes per second: ')
URL_OR_PORT = '(https://[A-Za-z0-9.-]+|[1-9][0-9]*(?=[ ,]))'
IN_COLOUR = re.compile('\x1b\\[[0-9;]*m')

# What ssh says where trying again can't help, and a sentence about its HOST, known as PLACE.
SSH_FAULTS = {
    'IDENTIFICATION HAS CHANGED|Host key verification failed':
        'HOST shows another host key than before, so someone may be in between; if its operator '
        'has made a new one, forget the old one: ssh-keygen -R PLACE',
    'Permission denied|Too many authentication failures':
        'HOST does not let you in; make a key with ssh-keygen if you have none, take it to a '
        'machine of yours with ssh-copy-id, and give its passphrase to ssh-add',
    'not known|nodename nor servname|No address associated':
        "can't find the host HOST; check how it is spelled",
    'remote port forwarding failed':
        'HOST refuses to forward; its sshd_config needs "AllowTcpForwarding yes"'}

# A broken path is seen after 15 s: at the third time that there should have been an answer.
SSH_OPTIONS = ('ExitOnForwardFailure=yes', 'ServerAliveInterval=5', 'ServerAliveCountMax=2',
               'StrictHostKeyChecking=accept-new', f'ConnectTimeout={HANDSHAKE_TIMEOUT:.0f}',
               'ControlPath=none', 'RemoteCommand=none')
SSH_ANSWERS, SSH_ASKS = 30.0, 120.0     # until there is a URL; where a person may type a password
LAST_SAID = 20                          # lines, to tell why ssh ended
VIA = re.compile(       # neither part begins with a dash: it would be an option
    r'(?:ssh://)?((?:[\w.+%][\w.+%-]*@)?)(\w[\w.-]*|\[[\da-f:]+\])((?::\d{1,5})?)/?', re.ASCII)


class Ssh(Carrier):
    """An ssh process to one machine, and another one whenever the client comes back."""

    def __init__(self, label: str, user: str, host: str, port: str) -> None:
        self._where, self.name, self._label = f'ssh://{user}{host}{port}', host.lower(), label
        self.service = next((service for domain, service in SERVICES.items()
                             if f'.{self.name}'.endswith(f'.{domain}')), PLAIN)
        self._port = self.service.port
        # A password may be typed at first; later the terminal is read for single keys.
        self._asks = sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()
        # What ssh says of it, which knows it by the name that the user's settings give to this one.
        self._known = {'host': host.strip('[]'), 'key': 'not told',
                       'to': self.name, 'port': port[1:] or '22'}
        self._said: collections.deque[str] = collections.deque(maxlen=LAST_SAID)
        self._task: asyncio.Task[None] | None = None        # while a process runs
        self._connection: Connection | None = None          # of the client to its server

    def carry(self, app: App, client: Client, server: Server) -> None:
        self._runtime, self._observer, self._server = app.runtime, app.observer, server
        self._dial, self._door = client.dial, client.address.port
        client.dial = self._connect

    async def _connect(self, timeout: float) -> Connection:
        """A connection to the server here, once visitors can come.  Raises Refused."""
        if self._task is None or self._task.done():
            self._up: asyncio.Future[LocaltunnelError | None] = self._runtime.loop.create_future()
            self._task = self._runtime.spawn(self._run())
        patience, port = SSH_ASKS if self._asks else SSH_ANSWERS, self._port
        try:
            error = await asyncio.wait_for(self._up, patience)
        except asyncio.TimeoutError:
            await end_task(self._task)
            raise Disconnected(f'{self.name} gave no URL within {patience:.0f} s') from None
        if error and self._port != port:
            self._observer.note(str(error))
            return await self._connect(timeout)     # for another one, at once
        if error:
            raise error
        self._asks = False
        connection = self._connection = await self._dial(timeout)
        if self._task.done():
            connection.abort()
        return connection

    async def _start(self) -> asyncio.subprocess.Process:
        """Start ssh.  A plain sshd runs nothing for us; a service says the URL in its session."""
        plain, pipe = self.service is PLAIN, asyncio.subprocess.PIPE
        address = '*:' if plain else f'{self._label}:' if self._label else ''
        options = [f'-o{option}' for option in (
            *SSH_OPTIONS, f'BatchMode={"no" if self._asks else "yes"}')]
        # Ctrl-C is for us: open requests finish before ssh ends.
        apart: dict[str, Any] = {'start_new_session': True}
        if self._asks:
            apart = {'preexec_fn': lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
                     } if os.name == 'posix' else {}
        return await asyncio.create_subprocess_exec(
            'ssh', '-v', '-NT' if plain else '-T', *options, '-R',
            f'{address}{self._port}:localhost:{self._door}', '--', self._where, stdin=pipe,
            stdout=pipe, stderr=asyncio.subprocess.STDOUT, limit=MAX_LINE, **apart)

    async def _run(self) -> None:
        """One process, from its start to its end."""
        self._said.clear()
        try:
            process = await self._start()
        except OSError as e:
            return self._up.set_result(Refused(
                502, 'ssh', f"can't run ssh ({plainly(e)}); install the client of OpenSSH"))
        assert process.stdout
        AT_LAST.append(process.kill)
        try:
            while not process.stdout.at_eof():
                with contextlib.suppress(ValueError):       # a line too long to be of interest
                    self._hear(await process.stdout.readline())
            await asyncio.wait({asyncio.ensure_future(process.wait())}, timeout=LINGER)
        finally:
            if process.returncode is None:
                process.terminate()
            ended = asyncio.ensure_future(process.communicate())    # which closes its pipes
            self._runtime.loop.call_later(LINGER, ended.cancel)
            while not ended.done():             # however often this is cancelled
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({ended})
                    await asyncio.sleep(0)      # asyncio closes them in the next turn
            AT_LAST.remove(process.kill)
            if process.returncode is None:
                process.kill()
            if self._connection:
                self._connection.abort()        # so that the client comes back
        if not self._up.done():
            self._up.set_result(self._why())
        else:
            self._observer.note(str(self._why()))

    def _hear(self, line: bytes) -> None:
        """Take in a LINE of what ssh or the machine says."""
        text = printable(IN_COLOUR.sub('', line.decode(errors='replace')).strip())[:MAX_TEXT]
        heard = HEARD.match(text)
        if heard is None:
            self._said.extend(text.splitlines())        # but not an empty line
        elif heard['new']:
            self._observer.note(f'{self.name} is new here; its host key is {self._known["key"]}, '
                                'as its operator can confirm, and from now on has to stay the same')
        else:
            self._known.update((key, value) for key, value in heard.groupdict().items() if value)
        found = re.search(self.service.before + URL_OR_PORT, text)
        if found and not self._up.done():
            self._found(found[1])

    def _found(self, url: str) -> None:
        """Visitors can come: to URL, or to this port."""
        if self.service is PLAIN:
            self._port = url            # next time, too, so that the URL stays
            self._runtime.spawn(self._look(self._known['host'], int(url)))
            url = f'http://{bracketed(self._known["host"])}:{url}'
        self._server.visitors.front = Front(
            [network('127.0.0.0/8'), network('::1')] if self.service.tells else [], url)
        for tunnel in self._server.tunnels:
            tunnel.url = url
        self._up.set_result(None)

    async def _look(self, host: str, port: int) -> None:
        """Tell the user if visitors are not let in: ssh does not know."""
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), CONNECT_TIMEOUT)
            writer.close()
        except (OSError, asyncio.TimeoutError):
            self._observer.hint(f'nothing answers on port {port} of {host}: its sshd_config needs '
                                '"GatewayPorts clientspecified", its firewall to let visitors in')

    def _why(self) -> LocaltunnelError:
        """Why ssh has ended."""
        said = '\n'.join(self._said)
        if self._port != self.service.port and 'remote port forwarding failed' in said:
            self._port = self.service.port
            return Disconnected(f'the port is taken at {self.name}; asking for another one')
        for words, fault in SSH_FAULTS.items():
            if re.search(words, said):
                to, port = self._known['to'], self._known['port']
                return Refused(502, 'ssh', fault.replace('HOST', self.name).replace(
                    'PLACE', to if port == '22' else f"'[{to}]:{port}'"))
        return Disconnected(': '.join([f'ssh to {self.name} ended', *list(self._said)[-1:]]))


class ViaSsh(Annex):
    """The option --via."""
    title = 'without a server'

    def client_options(self, add: Add) -> None:
        add('--via', metavar='[USER@]HOST',
            help='let this sshd, or a service such as srv.us, carry visitors here')

    def carrier(self, args: Args) -> Carrier | None:
        if args.via is None:
            return None
        if args.join or args.server or args.local or args.token or args.pin:
            raise UsageError('--via takes no server, so it goes with none of --join, --server, '
                             '--local, --token and --pin')
        parts = VIA.fullmatch(args.via)
        if not parts:
            raise UsageError(f'--via takes [USER@]HOST or ssh://[USER@]HOST:PORT, not {args.via}')
        ssh = Ssh(args.name or '', *parts.groups())
        if args.name and not ssh.service.names:
            raise UsageError(f'--name means nothing to {ssh.name}, which makes the URL by itself')
        if getattr(args, 'allow', None) and not ssh.service.tells:
            raise UsageError(f'--allow has nothing to go by: {ssh.name} does not tell where '
                             'visitors come from; --auth works')
        return ssh


# ================================================================================================
# III. THE COMMAND LINE
#
# What people type and see, and the only place that knows all.
# ================================================================================================

# ------------------------------------------------------------------------------------------------
# 59. Output
#
# Lines for people and scripts.  They are written in a thread of their own, so that what is served
# waits for no reader; and numbers, times and sentences look the same everywhere.
# ------------------------------------------------------------------------------------------------

def dropped_lines(count: int) -> str:
    """Return what stands where COUNT lines are missing."""
    return f'... {count} lines dropped: the reader of this log is too slow'


# The cursor waits where the line that changes begins.  There it stays when a window that becomes
# narrower breaks that line, so all below is the line.
ERASE_LINE = '\r\x1b[J'


MAX_UNWRITTEN = 1 * MIB         # of log and events unread: beyond it, lines are dropped
LINES_TOGETHER = 0.05           # log lines of a busy tunnel are written together


class Writer:
    """Writes in a thread of its own, so that a reader that stalls holds nothing up.

    Once too much is unread, lines are dropped until the reader has caught up, and then counted.
    After each write it rests, and what can wait is written together.  On a terminal there may be
    one line that changes, below all that is written.
    """

    def __init__(self) -> None:
        self.failed = False
        self._queue: collections.deque[tuple[TextIO, str]] = collections.deque()
        self._put = self._written = 0       # characters; each is counted by one thread
        self._dropped = 0           # lines
        self._tells: tuple[TextIO, Callable[[int], str]]        # where, and how, of the latter
        self._last = ''             # the line that changes
        self._stands = ''           # what stands there now where the next line goes
        self._writes = self._rests = False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def put(self, stream: TextIO, line: bool, dropped: Callable[[int], str], text: str) -> None:
        """Write TEXT at once, or soon if it is a LINE; or let DROPPED say how many are missing."""
        if line:
            text += '\n'
        if self._dropped or self._put - self._written > MAX_UNWRITTEN:
            with self._changed:
                if not self._dropped:       # as what is missed first would be said
                    self._tells = stream, dropped
                self._dropped += text.count('\n')
        else:       # without the lock, since each request comes here
            self._queue.append((stream, text))
            self._put += len(text)
        if not (line and self._rests):
            with self._changed:
                self._changed.notify_all()

    def change(self, stream: TextIO, text: str) -> None:
        """Let TEXT be the line that changes; '' for none."""
        with self._changed:
            self._last = text
            self._queue.append((stream, ''))
            self._changed.notify_all()

    def soiled(self) -> None:
        """The terminal may have echoed a key: the next line needs a clean place."""
        self._stands = self._stands or ' '

    def _write(self, stream: TextIO, text: str) -> None:
        last = self._last
        if text or last != self._stands:
            stream.write((ERASE_LINE if self._stands else '') + text + last + '\r' * bool(last))
            stream.flush()
            self._stands = last

    def _taken(self) -> tuple[TextIO, str]:
        """What is next: a stream, and all that goes there before something for another one."""
        if not self._queue:         # all that was not dropped has been written
            stream, dropped = self._tells
            text, self._dropped = dropped(self._dropped) + '\n', 0
            self._written -= len(text)      # nobody has put it
            return stream, text
        stream, texts = self._queue[0][0], []
        while self._queue and self._queue[0][0] is stream:
            texts.append(self._queue.popleft()[1])
        return stream, ''.join(texts)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._dropped)
                self._writes, (stream, text) = True, self._taken()
            try:
                self._write(stream, text)
            except (OSError, ValueError):       # the reader went away, or the disk is full
                self.failed = True
            with self._changed:
                self._written += len(text)
                self._writes, self._rests = False, True
                self._changed.notify_all()
                self._changed.wait(LINES_TOGETHER)
                self._rests = False

    def finish(self, timeout: float) -> bool:
        """Wait until all is written; return True if it was."""
        with self._changed:
            self._changed.notify_all()
            return self._changed.wait_for(
                lambda: not (self._queue or self._dropped or self._writes), timeout
                ) and not self.failed


WRITERS: dict[tuple[int, int], Writer] = {}     # by file, so that stdout and stderr stay in order


def writer_of(stream: TextIO) -> Writer | None:
    """Return who writes to STREAM; None if it is in memory.  Raises ValueError if it is closed."""
    try:
        status = os.fstat(stream.fileno())
    except OSError:
        return None
    file = status.st_dev, status.st_ino or stream.fileno()      # Windows gives pipes no numbers
    if file not in WRITERS:
        WRITERS[file] = Writer()
    return WRITERS[file]


def put(stream: TextIO | None, text: str) -> None:
    """Write TEXT at once; ignore a reader that went away or was never there."""
    if stream is None:
        return
    with contextlib.suppress(ValueError):       # it was closed
        writer = writer_of(stream)
        if writer:
            writer.put(stream, False, dropped_lines, text)
        else:
            stream.write(text)


def lines_to(stream: TextIO | None,
             dropped: Callable[[int], str] = dropped_lines) -> Callable[[str], None]:
    """What writes a line to STREAM, and those of a busy moment together."""
    if stream is None or stream.closed:
        return lambda text: None
    writer = writer_of(stream)
    return functools.partial(writer.put, stream, True, dropped) if writer else (
        lambda text: put(stream, text + '\n'))


def finish_writing() -> bool:
    """Wait a moment until all has left; return True if it has."""
    deadline = time.monotonic() + LAST_LINES
    return all([writer.finish(deadline - time.monotonic()) for writer in WRITERS.values()])


def is_terminal(stream: TextIO | None) -> bool:
    """Return True if STREAM is a terminal."""
    return stream is not None and not stream.closed and stream.isatty()


def is_plain() -> bool:
    """Return True if terminals get neither colours nor a line that changes."""
    return 'NO_COLOR' in os.environ or os.environ.get('TERM') == 'dumb'


def in_foreground(terminal: TextIO) -> bool:
    """Return True if keys go to this program, and a line that changes disturbs no other."""
    try:
        return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except (OSError, AttributeError):           # jobs are not controlled there; Windows
        return True


NARROWEST = 20                  # terminal for which lines are broken


def columns() -> int:
    """Return how many characters a line of the terminal may have, now."""
    said = shutil.get_terminal_size().columns       # 0 before 3.11, where the terminal says nothing
    return max(said or 80, NARROWEST) - 1           # the last would wrap some


WAITING = '33'                  # the colour of what is not there yet


def change_line(text: str, colour: str = WAITING) -> bool:
    """Let TEXT stand below all that is written, until it changes; '' takes it away.

    Returns False if it belongs into a line of its own, since stderr can't show it, or others write
    there: where a person sits, stdin is a terminal, too.
    """
    stream = sys.stderr
    if not (is_terminal(stream) and is_terminal(sys.stdin)) or is_plain() or (
            text and not in_foreground(stream)):
        return False
    writer, room = writer_of(stream), columns()
    if writer:
        text = text if len(text) <= room else text[:room - 3] + '...'
        writer.change(stream, text and f'\x1b[{colour}m{text}\x1b[0m')
    return True


def clean_lines() -> None:
    """Ctrl-C was typed, which terminals echo: it must not stick to what is written next."""
    for stream in (sys.stdout, sys.stderr):
        writer = writer_of(stream) if is_terminal(stream) and not is_plain() else None
        if writer:
            writer.soiled()


def at_words(text: str, stream: TextIO | None) -> str:
    """Return TEXT broken at words to the width of STREAM, if that is a terminal.

    A command is not broken, so that it can be copied.
    """
    if not is_terminal(stream) or len(text) <= columns():
        return text
    lines: list[str] = []
    for line in text.splitlines():
        prose, *command = re.split('(?=python3 |chmod )', line, maxsplit=1)
        lines += textwrap.wrap(prose, columns(), subsequent_indent='  ', break_long_words=False,
                               break_on_hyphens=False, drop_whitespace=not command) or ['']
        lines[-1] += ''.join(command)
    return '\n'.join(lines)


def say(text: str) -> None:
    """Write a line to stderr."""
    put(sys.stderr, at_words(text, sys.stderr) + '\n')


def frame_lines() -> Trace:
    """What writes a line to stderr for each frame of the protocol (--verbose)."""
    add = lines_to(sys.stderr)

    def frame(direction: str, kind: int, stream: int, size: int) -> None:
        name = KIND_NAMES[kind & ~END] + (' END' if kind & END else '')
        add(f'{direction} {name} #{stream} {size}')
    return frame


LOG = logging.getLogger('localtunnel')      # warnings; and in a program all that users would read


@functools.lru_cache(maxsize=1)
def complain_of_files(minute: int) -> None:
    """Say that files can't be opened, once in a MINUTE: asyncio tries again without end."""
    say('error: too many files are open, so nobody can come in for now; raise the limit of open '
        'files (ulimit -n)')


class Complaints(logging.Handler):
    """Writes what is logged here, and by asyncio, which by itself would wait for the reader."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and no_files_left(record.exc_info[1]):
            return complain_of_files(int(time.monotonic() // 60))
        say(f'{record.levelname.lower()}: {self.format(record)}')


@functools.lru_cache(maxsize=1)
def clock_at(second: int) -> str:
    """Return the date and time of SECOND, Unix time: a busy log asks a thousand times a second."""
    return time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(second))


def clock() -> str:
    """Return the date and time, now."""
    return clock_at(int(time.time()))


def in_text(facts: Facts) -> str:
    """Return FACTS as they follow a sentence; those that are empty are left out."""
    shown = ((name, printable(str(value))) for name, value in facts.items() if value)
    return ''.join(f' {name}={value}' if re.fullmatch('[^\\s"=]+', value) else
                   f' {name}={json.dumps(value)}' for name, value in shown)


def duration(seconds: float) -> str:
    """Return SECONDS as people read them: 12ms, 4.0s, 3min20s, 2h14min."""
    if seconds < 0.9995:
        return f'{round(seconds * 1000)}ms'
    if seconds < 99.95:
        return f'{seconds:.1f}s'
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}h{minutes}min' if hours else f'{minutes}min{seconds}s'


def in_bytes(size: int) -> str:
    """Return SIZE, in bytes, as people read it."""
    if size < 1000:
        return f'{size}B'
    unit, name = (1e3, 'kB') if size < 1e6 else (1e6, 'MB') if size < 1e9 else (1e9, 'GB')
    return f'{size / unit:.1f}{name}'


def cut_in_middle(text: str, room: int) -> str:
    """Return TEXT without its middle where it has more than ROOM characters."""
    half = (room - 3) // 2
    return text if len(text) <= room else f'{text[:half]}...{text[len(text) - (room - 3 - half):]}'


def counted(number: int, what: str) -> str:
    """Return NUMBER and WHAT, with an s where there is not one."""
    return f'{number:,} {what}' + ('s' if number != 1 else '')


# ------------------------------------------------------------------------------------------------
# 60. Keys
#
# Single keys at a terminal, which do something at once, and the browser that some of them open.
# ------------------------------------------------------------------------------------------------

# What a key does, in words, and what is called.
Actions = Dict[str, Tuple[str, Callable[[], None]]]
USUAL: list[Any] = []           # how the terminal at stdin was, while keys are read from it


def give_terminal_back() -> None:
    """Set the terminal at stdin as it was, if keys are read from it."""
    if USUAL:
        import termios
        with contextlib.suppress(termios.error):        # it is gone
            termios.tcsetattr(sys.stdin, termios.TCSANOW, USUAL.pop())


class Keys:
    """Reads keys, which are not echoed, and does what they stand for.

    They are read while this program is in the foreground: reading in the background, or setting the
    terminal there, would stop it.  Nobody says when it comes there, so that is looked at.
    """

    def __init__(self, runtime: Runtime, actions: Actions) -> None:
        self._runtime, self._actions = runtime, actions
        self._loop = runtime.loop

    def start(self) -> None:
        """Read keys from now on."""
        self._runtime.swept.add(self)
        self._loop.add_signal_handler(signal.SIGTSTP, self._stop)
        self.sweep()

    @staticmethod
    def possible() -> bool:
        """Return True if there is a terminal whose keys can be read."""
        return (hasattr(signal, 'SIGTSTP') and is_terminal(sys.stdin) and is_terminal(sys.stdout))

    def sweep(self, *_: Any) -> None:
        """Begin to read keys, or leave them to another program."""
        if in_foreground(sys.stdin) != bool(USUAL):
            if USUAL:
                self._loop.remove_reader(sys.stdin)
                USUAL.clear()       # the one in the foreground has it as it likes
            else:
                self._begin()

    def _begin(self) -> None:
        import termios
        with contextlib.suppress(termios.error):        # it is gone
            USUAL.append(termios.tcgetattr(sys.stdin))
            ours = termios.tcgetattr(sys.stdin)
            ours[3] &= ~(termios.ICANON | termios.ECHO)
            ours[6][termios.VMIN], ours[6][termios.VTIME] = 1, 0
            termios.tcsetattr(sys.stdin, termios.TCSANOW, ours)
            self._loop.add_reader(sys.stdin, self._typed)

    def _typed(self) -> None:
        try:
            typed = os.read(sys.stdin.fileno(), KIB)
        except BlockingIOError:
            return
        except OSError:
            typed = b''
        if not typed:
            return self.close()     # the terminal is gone
        action = self._actions.get(typed.decode('latin-1'))     # or it was pasted
        if action:
            action[1]()

    def _stop(self) -> None:
        """Ctrl-Z was typed."""
        self._end()
        self._loop.remove_signal_handler(signal.SIGTSTP)
        os.kill(os.getpid(), signal.SIGTSTP)        # from here it goes on after `fg` or `bg`
        self._loop.add_signal_handler(signal.SIGTSTP, self._stop)
        self.sweep()

    def _end(self) -> None:
        if USUAL:
            self._loop.remove_reader(sys.stdin)
            give_terminal_back()

    def close(self) -> None:
        """Give the terminal back for good."""
        self._runtime.swept.discard(self)
        self._loop.remove_signal_handler(signal.SIGTSTP)
        self._end()


def open_in_browser(url: str) -> None:
    """Open URL; where there is no window for it, say so instead of filling the terminal."""
    import webbrowser
    if not re.match('https?://', url):
        return say(f'{url} is not for a browser')
    if sys.platform.startswith(('linux', 'freebsd')) and not (
            os.environ.get('DISPLAY') or os.environ.get('WAYLAND_DISPLAY')):
        return say(f'there is no browser with a window here; open {url} where there is one')
    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()


# ------------------------------------------------------------------------------------------------
# 61. Terminal
#
# What people and scripts see: banner, log lines, JSON events.  Observers are told; they ask nobody.
#
# A terminal gets colour and a line for each exchange.  If stdout is not a terminal, its first line
# is just the URL, and everything else goes to stderr; with --json it has one object a line.
# ------------------------------------------------------------------------------------------------

def is_public(url: str) -> bool:
    """Return True unless URL names this machine, or nothing."""
    host, colon, port = url.partition('://')[2].partition('/')[0].rpartition(':')
    return url != '' and not is_loopback(host or port)


class Crowd:
    """Lets MOST lines through within SECONDS, and counts the others."""

    def __init__(self, most: int, seconds: float) -> None:
        self._most, self._seconds = most, seconds
        self._until = -NEVER        # when the next ones are let through
        self._room = 0              # for lines, until then
        self.held = 0               # lines held back, and not told of

    def lets(self, now: float) -> bool:
        """Return True if there is room for one more line."""
        if now >= self._until and not self.held:
            self._until, self._room = now + self._seconds, self._most
        self.held += not self._room
        self._room = max(0, self._room - 1)
        return not self.held

    def missing(self, now: float) -> int:
        """Return how many were held back, once it is time to tell of them; then they are told."""
        missing = self.held if now >= self._until else 0
        if missing:
            self._until, self.held = -NEVER, 0
        return missing


STATUS_COLOURS = {'g': '35', '1': '36', '2': '32', '3': '36', '4': '33', '5': '31'}
TOO_SLOW = 5.0                  # seconds in red
MOST_ROWS = 20                  # lines for requests in a second: nobody reads more
TIMES = 100                     # of the latest requests, for the median
PATHS = 16, 40                  # characters of a path at least, and to where they are aligned

# What stands behind the server's address, by where that was taken from.
SOURCES = {'': '(runs in this process)', 'this script': '(as this script says)',
           'remembered': '(remembered; --local for this machine only)',
           'LOCALTUNNEL_SERVER': '(as LOCALTUNNEL_SERVER says)',
           'LOCALTUNNEL_JOIN': '(as LOCALTUNNEL_JOIN says)',
           'carrier': 'carries visitors here, and sees what passes'}


def event_line(event: str, **values: Any) -> str:
    """Return a line for programs, of a client (--json) or a server (--log-format json)."""
    return json.dumps({'event': event, 'time': rfc3339(time.time()), **values})


# What is always known of a tunnel: its server, and where that was taken from; whether the URL works
# elsewhere, and needs a password; the networks that may come.  All else has a row in the banner.
ABOUT = 'target', 'server', 'source', 'public', 'protected', 'allow'


class Terminal(ClientObserver):
    """Tells a user what a client does."""

    def __init__(self, args: Args, about: Mapping[str, Any],
                 first: Callable[[], None] = lambda: None, keys: Actions | None = None) -> None:
        """ABOUT has what is known of the tunnel, see ABOUT; nothing where it is about several.

        FIRST is called when the tunnel is up for the first time.  KEYS are those of others, too.
        """
        self._name = args.tunnel        # it tells this one from others on the same terminal
        self._whose = f'{args.tunnel}: ' if args.tunnel else ''     # what stands before a line
        self._about, self._first = {**about}, first
        self._json, self._quiet = args.json, args.quiet
        self._tty = is_terminal(sys.stdout)
        self._coloured = [] if is_plain() else list(filter(is_terminal, (sys.stdout, sys.stderr)))
        self._add = lines_to(
            sys.stdout if self._json or self._tty else sys.stderr,
            (lambda count: event_line('dropped', lines=count)) if self._json else dropped_lines)
        self._url = ''
        self.keys = {} if keys is None else keys        # what the keys of the terminal do
        self._errors = 0
        self._since = 0.0           # when the tunnel was up for the first time; 0 before
        # Since when the server is lost, if it is; why, and when it is tried again.
        self._lost: tuple[float, str, float] | None = None
        self._crowd = Crowd(MOST_ROWS, 1.0)
        self.times: collections.deque[float] = collections.deque(maxlen=TIMES)     # took requests

    def note(self, text: str, event: str = 'note', **facts: Any) -> None:
        self._event(event, message=text, **facts)
        if not self._quiet:
            say(self._whose + text + in_text(facts))

    def hint(self, text: str) -> None:
        self._event('hint', message=text)
        if not self._quiet:
            say(self._paint('36', 'hint: ', sys.stderr) + self._whose + text)

    def ready(self, url: str, user: str, round_trip: float) -> None:
        self._first()
        self._found()
        self._url, self._since = url, time.monotonic()
        self._about['public'] &= is_public(url)
        if self._json:
            return self._event('open', url=url, user=user, **self._about,
                               round_trip_ms=round(round_trip * 1e3, 1))
        rows = self._rows(user, round_trip)
        leads = f'{url} -> {self._about["target"]}'
        facts = ', '.join(f'{name} {value}' for name, value in rows.items()
                          if not self._name or name != 'inspector')
        if self._quiet or not self._tty:
            put(sys.stdout, f'{self._name} {url}\n'.lstrip())
            if not self._quiet:
                say(f'{self._whose}{leads} ({facts})')
            return
        if self._name:
            return put(sys.stdout, f'  {self._name:<10}  {leads}\n'.replace(
                url, self._paint('1;32', url)) + self._paint('2', f'{"":14}{facts}') + '\n')
        lines = at_words(f'  {leads}', sys.stdout)
        shown = '\n' + lines.replace(url, self._paint('1;32', url), 1) + '\n\n'
        for name, value in rows.items():
            value = textwrap.fill(value, max(30, columns() - 12), break_long_words=False,
                                  break_on_hyphens=False).replace('\n', '\n' + ' ' * 12)
            shown += self._paint('2', f'  {name:<10}') + value + '\n'
        put(sys.stdout, shown)
        self.help()
        put(sys.stdout, '\n')

    def watched(self, url: str) -> None:
        """What passes can be seen at URL."""
        self._about['inspector'] = url
        self.keys['i'] = 'shows what passes', functools.partial(open_in_browser, url)
        if self._since:
            self.note(f'what passes can be seen at {url}')

    def also(self, name: str, text: str) -> None:
        self._about[name] = text
        if self._since:
            self.note(text)

    # Keys.

    def listen(self, runtime: Runtime, leave: Callable[[], None],
               at_once: bool = True) -> Keys | None:
        """Read keys, where a person sits in front of a terminal; `q` calls LEAVE.

        If not AT_ONCE, once the tunnel is there: until then a password may be asked for.
        """
        if self._json or self._quiet or not Keys.possible():
            return None
        if self._about:
            self.keys.update({'c': ('copies the URL', self._copy),
                              'o': ('opens it', lambda: open_in_browser(self._url))})
        self.keys.update({'q': ('quits', leave), '?': ('says so', self.help)})
        keys = Keys(runtime, self.keys)
        if at_once:
            keys.start()
        else:
            self._first = keys.start
        return keys

    def help(self) -> None:
        """Say how it ends, and what the keys do."""
        keys = sorted(self.keys.items(), key=lambda item: 'coiq?'.find(item[0]))
        text = ', '.join(f'{key} {does}' for key, (does, _) in keys)
        text = at_words('  ' + (text if 'q' in self.keys else 'Ctrl-C ends the tunnel'), sys.stdout)
        put(sys.stdout, self._paint('2', text) + '\n')

    def _copy(self) -> None:
        """Ask the terminal to put the URL on the clipboard (OSC 52)."""
        code = base64.b64encode(self._url.encode()).decode()
        put(sys.stdout, f'\x1b]52;c;{code}\x07  copied, if your terminal allows it\n')

    # What happens.

    def _rows(self, user: str, round_trip: float) -> dict[str, str]:
        """What there is to know of a tunnel, by what it is about."""
        about = self._about
        source = SOURCES.get(about['source'], '')
        server = f'{about["server"]} {source}'.rstrip()
        if about['source'] != 'carrier':
            server += f', {duration(round_trip)} away'
        allow = ', '.join(about['allow'])
        visitors = ('from ' + allow + ' only' if allow else 'anyone with the URL'
                    if about['public'] else 'this machine only')
        return {'server': server, **({'as': user} if user else {}),
                'visitors': visitors + (', with a password' if about['protected'] else ''),
                **{name: text for name, text in about.items() if name not in ABOUT}}

    def lost(self, why: str, seconds: float) -> None:
        now = time.monotonic()
        since, before, _ = self._lost or (now, '', now)
        self._lost = since, why, now + seconds
        if why != before:
            self._event('lost', reason=why, retry=round(seconds, 1))
        if not change_line(self.waits(now)) and why != before:
            say(self._paint('33', self._whose + why, sys.stderr) + '; trying again')

    def waits(self, now: float) -> str:
        """Return what it waits for, and for how long; '' where it does not."""
        if not self._lost:
            return ''
        _, why, again = self._lost
        when = f'in {again - now:.0f} s' if again - now >= 1 else 'now'
        return f'{self._whose}{why}; trying again {when}'

    def _found(self) -> float:
        """Forget that the server was lost; return for how many seconds it was."""
        change_line('')
        lost, self._lost = self._lost, None
        return time.monotonic() - lost[0] if lost else 0.0

    def back(self, url: str) -> None:
        seconds = self._found()
        self._event('back', url=url)
        say(f'{self._whose}{self._paint("32", "connected again", sys.stderr)} after '
            + duration(seconds) + (f', now at {url}' if url != self._url else ''))
        self._url = url

    def pending(self, exchange: Record, status: int) -> None:
        if self._json:
            self._event('pending', id=exchange.number, method=exchange.method,
                        target=exchange.target, status=status)
        elif not self._quiet:
            self._line(exchange, str(status or '...'), 'open' if status else 'pending')

    def exchange(self, exchange: Record, seconds: float) -> None:
        status, why = exchange.status, exchange.why
        if why or status >= 500:
            self._errors += 1
        if self._json:
            extra = {'error': why} if why else {}
            self._event('exchange', id=exchange.number, method=exchange.method,
                        target=exchange.target, status=status, ms=round(seconds * 1000, 1),
                        bytes=exchange.size, **extra)
        elif not self._quiet:
            self.times.append(seconds)
            if self._tty and status < 500 and not self._crowd.lets(time.monotonic()):
                return
            slow = seconds >= SLOW and status != 101 and exchange.method != 'TCP'   # which may last
            colour = '' if not slow else '33' if seconds < TOO_SLOW else '31'
            self._line(exchange, str(status or 'gone'), duration(seconds), in_bytes(exchange.size),
                       colour)

    def _line(self, exchange: Record, status: str, took: str, size: str = '',
              colour: str = '') -> None:
        """Write a line for EXCHANGE; TOOK says for how long it ran."""
        at, number, name = clock()[11:], exchange.number, self._name
        method, path, why = exchange.method, printable(exchange.target), exchange.why
        if not self._tty:
            whose, why = f'{name} ' if name else '', f' {printable(why)}' if why else ''
            return self._add(
                f'{at} #{number} {whose}{status} {method} {path} {took} {size}'.rstrip() + why)
        begin, method = f'{at} #{number} ', f'{method:<6}'
        begin = f'{begin:<14}' + (f'{name:<8} ' if name else '')
        room = max(PATHS[0], columns() - len(begin) - len(method) - 23)
        path = f'{cut_in_middle(path, room):<{min(room, PATHS[1])}}'
        status = self._paint(STATUS_COLOURS.get(status[0], '2'), status) + ' ' * (5 - len(status))
        took = ' ' * (8 - len(took)) + self._paint(colour, took)
        below = textwrap.fill(printable(why), columns(), initial_indent='\n' + ' ' * 14,
                              subsequent_indent=' ' * 14)
        self._add(f'{begin}{status}{method} {path} {took} {size:>7}'.rstrip() + below)

    def thinned(self, now: float) -> None:
        """Say how many requests had no line, if it is time to."""
        missing = self._crowd.missing(now)
        if missing:
            self._add(self._paint('2', f'... {missing:,} more'))

    def ended(self, requests: int, received: int, sent: int, why: str = '', code: int = 0) -> None:
        """The client has ended: sum up, where a person reads it.

        WHY it has and its CODE are told of one of several; of a single one others tell.
        """
        change_line('')
        if self._name:
            self._event('end', code=code, reason=why)
        if why:
            say(self._whose + why)
        self.thinned(NEVER)
        if self._tty and self._since and not (self._json or self._quiet):
            took = duration(time.monotonic() - self._since)
            self._add(at_words(
                f'{self._whose}ended after {took}: {counted(requests, "request")}, '
                f'{counted(self._errors, "error")}, {in_bytes(received)} in, {in_bytes(sent)} out',
                sys.stdout))

    def _paint(self, code: str, text: str, stream: TextIO | None = None) -> str:
        """Return TEXT, in colour if STREAM, by default stdout, is a terminal that shows it."""
        coloured = code and (stream or sys.stdout) in self._coloured
        return f'\x1b[{code}m{text}\x1b[0m' if coloured else text

    def _event(self, event: str, **values: Any) -> None:
        if self._json:
            whose = {'tunnel': self._name} if self._name else {}
            self._add(event_line(event, **whose, **values))


def progress(record: Record) -> str:
    """Return how far the body of RECORD has come that is on its way; '' where there is none."""
    if isinstance(record, Exchange):
        for body in (record.answer, record.body):
            if isinstance(body, Body) and body.taken and not body.finished:
                done, whole = body.taken, body.taken + body.left
                if type(body) is not Body or whole == NEVER:
                    return f'#{record.number} {in_bytes(done)}'
                bar = '#' * int(10 * done / whole)
                return f'#{record.number} [{bar:.<10}] {done / whole:.0%} of {in_bytes(int(whole))}'
    return ''


PULSE_OVER = 5.0                # seconds over which its rates are taken


class Pulse:
    """The line that changes: how busy the tunnels are, and how far what takes long has come."""

    def __init__(self, runtime: Runtime,
                 tunnels: Callable[[], Sequence[tuple[App, Client, Terminal]]]) -> None:
        """TUNNELS returns those that there are now."""
        self._runtime, self._tunnels = runtime, tunnels
        # Of late: when, and how many requests, bytes in and bytes out there had been by then.
        self._past: collections.deque[Sequence[float]] = collections.deque()
        runtime.swept.add(self)

    def sweep(self, now: float, woke_up: bool) -> None:
        """Show how it goes now."""
        past, tunnels = self._past, self._tunnels()
        counts = ((app.exchanges, *client.carried) for app, client, _ in tunnels)
        past.append((now, *map(sum, zip((0, 0, 0), *counts))))
        while now - past[0][0] > PULSE_OVER:
            past.popleft()
        waits = [terminal.waits(now) for *_, terminal in tunnels]
        for *_, terminal in tunnels:
            terminal.thinned(now)
        change_line('; '.join(filter(None, waits)) or self._busy(now, tunnels),
                    WAITING if any(waits) else '2')

    def _busy(self, now: float, tunnels: Sequence[tuple[App, Client, Terminal]]) -> str:
        then, *before = self._past[0]
        seconds = max(now - then, SWEEP)
        open_now = [record for app, *_ in tunnels for record in app.under_way]
        requests, received, sent = (max(0.0, there - was) / seconds     # one may just have gone
                                    for was, there in zip(before, self._past[-1][1:]))
        if not (requests or open_now):
            return ''
        slow = [progress(record) for record in open_now if now - record.began > SLOW]
        times = sorted(took for *_, terminal in tunnels for took in terminal.times)
        median = times[len(times) // 2] if times else 0.0
        return ', '.join((*filter(None, slow),      # first: the line is cut to the window's width
                          f'{requests:.1f} requests/s', f'{len(open_now)} open',
                          f'{in_bytes(int(received))}/s in', f'{in_bytes(int(sent))}/s out',
                          f'median {duration(median)}'))

    def close(self) -> None:
        """Show nothing more."""
        self._runtime.swept.discard(self)


REFUSALS, REFUSALS_WITHIN = 10, 10.0    # lines about refused clients in seconds


class ServerLog(Observer):
    """Tells an operator what a server does, in lines of text or JSON on stderr.

    Both carry the same facts: in text they follow the sentence as NAME=VALUE.
    """

    def __init__(self, as_json: bool) -> None:
        self._json = as_json
        self._add = lines_to(sys.stderr, lambda count: self._entry(
            dropped_lines(count), 'dropped', {'lines': count} if as_json else {}))
        self._crowd = Crowd(REFUSALS, REFUSALS_WITHIN)      # of clients that are refused

    def note(self, text: str, event: str = 'note', **facts: Any) -> None:
        # Those who are refused may come by the thousand.
        if event != 'refused' or self._crowd.lets(time.monotonic()):
            self._add(self._entry(text, event, facts))

    def sweep(self, now: float, woke_up: bool) -> None:
        """Say how many were refused without a line, if it is time to."""
        more = self._crowd.missing(now)
        if more:
            self.note(f'... and {more:,} more refused', event='more_refused',
                      **({'count': more} if self._json else {}))

    def flush(self) -> None:
        """Write what waits, and what was counted."""
        self.sweep(NEVER, False)
        put(sys.stderr, '')

    def _entry(self, text: str, event: str, facts: Facts) -> str:
        if self._json:
            return event_line(event, message=text, **facts)
        return at_words(f'{clock()} {text}' + in_text(facts), sys.stderr)

    def exchange(self, exchange: Record, seconds: float) -> None:
        """Write a line for a request; without the query of its target, which may hold secrets."""
        path, host, why = exchange.target.partition('?')[0], exchange.host, exchange.why
        if self._json:
            error = {'error': why} if why else {}
            self._add(event_line(
                'request', visitor=exchange.visitor, method=exchange.method, host=host, path=path,
                status=exchange.status, ms=round(seconds * 1000, 1), bytes=exchange.size,
                **exchange.facts, **error))
        else:
            facts = exchange.facts      # the name stands in the host
            client = facts['client']
            whose = (f' user={facts["user"] or "-"} client={client} version={facts["version"]}'
                     if client else '')
            self._add(f'{clock()} {exchange.visitor} {exchange.method} {host}'
                            f'{printable(path)} {exchange.status or "gone"} '
                            f'{round(seconds * 1000)}ms {exchange.size}B{whose}'
                            + (in_text({'error': why}) if why else ''))


# ------------------------------------------------------------------------------------------------
# 62. Options
#
# All that a user can type, and all annexes.
# ------------------------------------------------------------------------------------------------

ANNEXES: Sequence[Annex] = (Windows(), Resume(), KeptLeases(), Access(), Holding(), SharedSite(),
                            Crowds(), Cluster(), RawTcp(), FolderAndEcho(), HostHeader(),
                            OutgoingProxy(), Acme(), Certificates(), HandOver(), Operator(),
                            Blocking(), Keeping(), Mail(), Doctor(), LandingPage(), Verifying(),
                            Invitations(), Inspect(), Elsewhere(), ErrorPages(), SettingUp(),
                            ViaSsh())


def target_word(text: str) -> str:
    """TARGET as it was typed, but for `:8000` and `localhost:8000/`, as some write it."""
    if re.fullmatch(r'[\w.-]+:[0-9]+/.*', text) and not os.path.exists(text):
        return 'http://' + text
    return text[1:] if re.fullmatch(':[0-9]+', text) else text


ASK = object()      # what stands for a value that is to be asked for


def client_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('target', metavar='TARGET', type=target_word, nargs='*',
                        help='what visitors reach: 8000, ./FOLDER, ... (see below)')
    parser.add_argument('--config', metavar='FILE',
                        help='open the tunnels in this file, or those whose SECTION is named')

    add = parser.add_argument_group('the server').add_argument
    add('--join', nargs='?', const=ASK, metavar='CODE',
        help='go to the server that printed this code (without CODE: ask for it)')
    add('--server', metavar='URL', help='server: URL, or HOST for https (LOCALTUNNEL_SERVER)')
    add('--local', action='store_true', help='stay on this machine, whatever server is known')
    add('--public', action='store_true', help='exit with 2 if no public server is known')
    add('--token', help='token that the server asks for (LOCALTUNNEL_TOKEN)')
    add('--pin', metavar='SHA256', help='accept only this certificate of the server')
    add('--once', action='store_true', help='exit with an error instead of reconnecting')

    add = parser.add_argument_group('the tunnel').add_argument
    add('--name', type=str.lower, help='ask for this name; exit with 3 if it is refused')
    add('--release', action='store_true', help='with --name: give the name back, and exit')
    add('--share', action='store_true', help='let several of your clients serve one name')

    add = parser.add_argument_group('the app').add_argument
    add('--timeout', type=number, default=RESPONSE_TIMEOUT, metavar='SECONDS',
        help='wait this long for the app to respond (%(default).0f)')
    add('--ca', metavar='FILE', help='also trust this authority, for server and app')
    add('--insecure', action='store_true', help="don't check the certificate of an https app")

    add = parser.add_argument_group('output').add_argument
    add('--json', action='store_true', help='print one JSON object per line on stdout')
    add('--quiet', action='store_true', help='print only the URL and errors')
    add('--verbose', action='store_true', help='print a line for each frame of the protocol')

    for annex in ANNEXES:
        annex.client_options(parser.add_argument_group(annex.title).add_argument)


def domain(text: str) -> str:
    """A host, or an address."""
    if is_address(text):
        return str(ipaddress.ip_address(text.strip('[]')))
    if not all(map(NAME.fullmatch, text.lower().split('.'))):
        raise argparse.ArgumentTypeError('it takes a host name such as t.example.com, or an '
                                         f'address, not {text!r}')
    return text.lower()


def server_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--config', metavar='FILE', help='take the options in its section [server]')

    add = parser.add_argument_group('where it listens').add_argument
    add('--domain', default='localhost', type=domain,
        help='tunnels appear at NAME.DOMAIN (%(default)s)')
    add('--bind', metavar='ADDRESS', help='listen on this address (all; loopback for localhost)')
    add('--port', type=port_number, help='port for http (80; 8080 for localhost)')
    add('--tls-port', type=port_number, default=443, metavar='PORT',
        help='port for https, where there is a certificate (%(default)s)')
    add('--trust-proxy', type=network, action='append', default=[], metavar='CIDR',
        help='believe X-Forwarded-* of this proxy (repeatable)')

    add = parser.add_argument_group('who may open tunnels').add_argument
    add('--token', action='append', type=check_token,
        help='token for clients (repeatable; LOCALTUNNEL_TOKEN)')
    add('--open', action='store_true', help='let anyone open tunnels')

    add = parser.add_argument_group('limits').add_argument
    add('--hold', type=number, default=HELD, metavar='SECONDS',
        help='requests wait this long for a lost client (%(default).0f)')
    add('--drain', type=number, default=DRAIN, metavar='SECONDS',
        help='on shutdown, wait this long for requests (%(default).0f)')
    add('--rate', type=number, default=0, metavar='N',
        help='most requests per second and tunnel (no limit)')
    add('--buffer', type=count, default=0, metavar='MIB',
        help='most memory for data in transit (1/8 of the RAM)')
    add('--max-tunnels', type=count, default=MAX_TUNNELS, metavar='N',
        help='how many tunnels may be open at once (%(default)s)')

    add = parser.add_argument_group('this machine').add_argument
    add('--state', metavar='DIR', help='folder for leases, keys and the token made here')
    add('--log-format', choices=('text', 'json'), default='text',
        help='format of the log (%(default)s)')
    add('--verbose', action='store_true', help='log a line for each frame of the protocol')

    for annex in ANNEXES:
        annex.server_options(parser.add_argument_group(annex.title).add_argument)


class Parser(argparse.ArgumentParser):
    """A parser whose help goes the way of all other output, and whose errors are UsageErrors."""
    commands: Dict[str, Any] = {}       # parsers by name

    def __init__(self, **words: Any) -> None:
        self.typed: list[str] = []      # the options, each as a word
        super().__init__(**words)

    def _get_values(self, action: argparse.Action, values: list[str]) -> Any:
        if action.option_strings:
            self.typed.append('='.join([action.option_strings[0], *values]))
        return super()._get_values(action, values)

    def _print_message(self, message: str, file: Any = None) -> None:
        put(file or sys.stderr, message)

    def parse_args(self, words: Sequence[str]) -> Args:     # type: ignore[override]
        """What WORDS say.  `after` are those after a client's `--`, which are another command."""
        words = list(words)
        for command in self.commands.values():
            command.typed.clear()
        if words[:1] == ['help']:
            words = [*words[1:2], '--help']
        end = words.index('--', 2) if words[:1] == ['client'] and '--' in words[2:] else len(words)
        if words[end:] == ['--']:
            raise UsageError('what follows -- is a command to run beside the tunnel; name one')
        args, unknown = self.parse_known_args(words[:end])
        for name, value in vars(args).items():
            if value == '' or (isinstance(value, list) and '' in value):
                raise UsageError(f'{name.replace("_", "-")} is empty; is a variable unset?')
        args.after, args.tunnel = tuple(words[end + 1:]), ''
        if args.command == 'client' and not args.config:
            if not args.target:
                self.commands['client'].error('the following arguments are required: TARGET')
            args.target, *rest = args.target
            unknown = rest + unknown
        if unknown:
            self.commands[args.command].error("can't tell what this means: " + ' '.join(unknown))
        return args

    def error(self, message: str) -> NoReturn:
        """Raise UsageError, in our words."""
        missing = message.partition('arguments are required: ')[2]
        if missing:
            message = f'{missing} is missing, as in: {self.prog} {missing}'
        message = message.replace('expected one argument', 'its value is missing')
        message = message.replace('invalid network value:', 'it takes an address or a network such '
                                  'as 10.0.0.0/8, not')
        message = message.replace('invalid port_range value:', 'it takes A-B, not')
        message = re.sub('one of the arguments (.*) is required', lambda match:
                         'it takes one of ' + match.group(1).replace(' ', ', '), message)
        message = re.sub(r"COMMAND: invalid choice: '(.*)' \(choose from (.*)\)",
                         lambda m: f'there is no {m[1]} here, but {m[2]}'.replace("'", ''), message)
        raise UsageError(f'{re.sub("^argument ", "", message)}; see {self.prog} --help')


def spelled(word: str, known: Iterable[str], note: Callable[[str], Any]) -> str:
    """WORD, or the one of KNOWN that it looks most like."""
    import difflib
    text, equals, value = word.partition('=')
    close = [name for name in known if name.startswith(text) and len(text) > 2]
    close = close or difflib.get_close_matches(text, known, 1)
    if text in known or not close:
        return word
    note(f'there is no {text}')
    return close[0] + equals + value


def did_you_mean(words: Sequence[str], parser: Parser) -> str:
    """A sentence with the whole command that WORDS were probably meant to be, or ''."""
    import shlex
    notes: list[str] = []
    def ended(words: Sequence[str]) -> int:
        return words.index('--') if '--' in words else len(words)
    meant, command = words[:ended(words)], words[ended(words):]
    if len(words) == 1 and words[0] not in parser.commands['client']._option_string_actions:
        meant = [spelled(words[0], parser._option_string_actions, notes.append)]
    for annex in () if notes else ANNEXES:
        meant = annex.meant(meant, notes.append)
    meant, command = meant[:ended(meant)], [*meant[ended(meant):], *command]
    first, *rest = meant or ['']
    first = spelled(first, parser.commands, notes.append)
    if first in parser.commands:
        known = parser.commands[first]._option_string_actions
        rest = [spelled(word, known, notes.append) if word.startswith('-') else word
                for word in rest]
    meant = [first, *rest, *command]
    try:
        if not {'-h', '--help', '--version'}.intersection([first, *rest]):      # they print
            parser.parse_args(meant)
    except UsageError:
        return ''
    program = 'py localtunnel.py ' if os.name == 'nt' else 'python3 localtunnel.py '
    return printable(f'{", ".join(notes)}; did you mean: {program}{shlex.join(meant)}'
                     if notes else '')


# The exit code, by what ended the program; anything else is a failure, 1.
EXIT_CODES = {'usage': 2, 'name_taken': 3, 'bad_name': 3, 'reserved': 3,
              'too_many_names': 3, 'not_yours': 3, 'port_taken': 3, 'bad_port': 3, 'token': 4,
              'blocked': 4, 'superseded': 5}


def exit_code(error: LocaltunnelError) -> int:
    """The exit code of a program that ERROR has ended."""
    kind = 'usage' if isinstance(error, UsageError) else getattr(error, 'code', '')
    return EXIT_CODES.get(kind, 1)


EPILOG = """Add --help after client or server for their options.

examples:
  localtunnel.py client 8000                      give http://localhost:8000 a URL
  localtunnel.py server --domain t.example.com    run your own server"""

CLIENT_EPILOG = TARGET_FORMS + """

Every user of this machine can see your options in the list of processes: --join
without CODE asks for it, LOCALTUNNEL_JOIN hides it, LOCALTUNNEL_TOKEN hides a
token. LOCALTUNNEL_KEY replaces the key file.

-- COMMAND ... is run once the tunnel is there, with LOCALTUNNEL_URL in its
environment; the client ends when it does, with its exit code.

--config FILE: each section [NAME] is a tunnel, with target = TARGET and the
names of options as keys. SIGHUP reads it again.

exit codes: 0 ended by the user, 1 failure, 2 usage, 3 name refused,
4 token refused, 5 superseded

examples:
  localtunnel.py client 8000 --join                   asks for the server's code
  localtunnel.py client 8000 --server t.example.com   your app on port 8000
  localtunnel.py client ./dist --auth ann:secret      a folder, with a password
  localtunnel.py client 8000 --name shop              under a name you choose
  localtunnel.py client 22 --tcp                      ssh, on a public port
  localtunnel.py client 8000 -- pytest tests/hooks    tests that need a URL
  localtunnel.py client --config tunnels.ini          several tunnels at once"""

SERVER_EPILOG = """a line of the token file, as invite adds them:
  USER TOKEN|sha256:HASH [names=GLOB,...] [ports=A-B] [tunnels=N] [expires=DATE]

signals: SIGHUP reads files again (--config, tokens, certificate), SIGUSR2 hands
over to a new process, SIGTERM and SIGINT finish open requests, the second one
stops at once

examples:
  localtunnel.py server            a trial on this machine
  localtunnel.py server --domain t.example.com --acme you@example.com
  localtunnel.py server --domain t.example.com --token-file tokens
  localtunnel.py server --config server.ini"""


class Version(argparse.Action):
    """Prints which file this is: also a copy from a server has the digest of the original."""

    def __call__(self, parser: argparse.ArgumentParser, *typed: Any) -> None:
        try:
            which = f'SHA-256 {digest_of(original())}'
        except UsageError as e:
            which = f'SHA-256 unknown: {e}'
        put(sys.stdout, f'localtunnel {__version__}\n{which}\n')
        parser.exit()


def make_parser() -> Parser:
    """Return the parser of all that a user can type."""
    form: Any = {'formatter_class': argparse.RawDescriptionHelpFormatter, 'allow_abbrev': False}
    parser = Parser(prog='localtunnel.py', epilog=EPILOG, **form,
                    description='Puts a local program on the internet under a friendly URL.')
    parser.add_argument('--version', action=Version, nargs=0, help='show which file this is')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    parser.commands = commands.choices
    client_options(commands.add_parser(
        'client', help='give a local program a public URL', epilog=CLIENT_EPILOG,
        usage='%(prog)s TARGET [OPTION ...] [-- COMMAND ...]\n'
              '       %(prog)s --config FILE [SECTION ...] [OPTION ...]', **form))
    server_options(commands.add_parser(
        'server', help='run the server', epilog=SERVER_EPILOG, usage='%(prog)s [OPTION ...]',
        **form))

    def add(name: str, like: str = '', **words: Any) -> Parser:
        parents: Any = {'parents': [parser.commands[like]], 'add_help': False} if like else {}
        added: Parser = commands.add_parser(name, **parents, **words, **form)
        added.set_defaults(typed=added.typed)
        return added
    for annex in ANNEXES:
        annex.commands(add)
    return parser


# ------------------------------------------------------------------------------------------------
# 63. Wiring
#
# Which server, which token; the two halves of a client, and a server for this machine alone.
# ------------------------------------------------------------------------------------------------

# What the client keeps: its key, the servers that said welcome, and which was the last.

def make_key() -> bytes:
    """A new key; programs from before LONG_NAMES take it, too."""
    return LONG_NAMES + secrets.token_bytes(24)


def load_key() -> bytes:
    """Return the user's 32-byte key, from LOCALTUNNEL_KEY or the configuration folder, or new."""
    given = os.environ.get('LOCALTUNNEL_KEY')
    if given:
        if not re.fullmatch('[0-9a-fA-F]{64}', given):
            raise UsageError(
                'LOCALTUNNEL_KEY must be 64 hexadecimal digits; make them with: python3 -c '
                f'"import secrets; print(\'{LONG_NAMES.hex()}\' + secrets.token_hex(24))"')
        return bytes.fromhex(given)
    path = config_path('key')
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        if not os.path.exists(path):
            made = f'{path}.{secrets.token_hex(8)}'
            write_secret(made, make_key())
            with contextlib.suppress(OSError):  # another process was first, or no links here
                os.link(made, path)
            if os.path.exists(path):
                os.unlink(made)
            else:
                os.replace(made, path)
        key = read_secret(path, 'has your names; remove it to get new ones', LOG.warning)
    except OSError as e:
        LOG.warning("can't keep a key at %s (%s), so your name lasts only for this run; where "
                    'there is no disk, set LOCALTUNNEL_KEY', path, e.strerror)
        return make_key()
    if len(key) != 32:
        raise UsageError(f'{path} is damaged (a key is 32 bytes); restore it, or delete it to '
                         'start over with new names')
    return key


@functools.lru_cache(maxsize=None)
def warn_once(text: str) -> None:
    """Warn once about something that is looked at again and again."""
    LOG.warning(text)


class KnownServer:
    """A server, and what its user knows of it.

    `pin` is of its certificate, `exact` if the user gave it: one that came in a code yields to an
    authority's certificate.  `ca` is a file with its authority.  `source` says where the server was
    taken from: "--join", "--server", "LOCALTUNNEL_JOIN", "LOCALTUNNEL_SERVER", "this script",
    "remembered"; '' where this process runs it.
    """
    __slots__ = ('address', 'source', 'token', 'pin', 'ca', 'exact')

    def __init__(self, address: str, source: str = '', token: str = '', pin: str = '',
                 ca: str = '', exact: bool = False) -> None:
        """Raises UsageError for what can't be right, be it typed, kept or sent by someone."""
        self.address, self.source = server_address(address), source
        self.token = check_token(token) if token != '' else ''
        self.pin = pin.replace(':', '').lower()
        if self.pin and not (re.fullmatch('[0-9a-f]{64}', self.pin)
                             and self.address.scheme == 'https'):
            raise UsageError('--pin takes 64 hexadecimal digits, and needs an https server')
        self.ca = os.path.abspath(ca) if ca != '' else ''
        self.exact = bool(exact)


def kept_servers() -> dict[str, Any]:
    """Return {"last": address, "servers": {address: {"token", "pin", "ca", "exact"}}}."""
    path = config_path('servers.json')
    if not os.path.exists(path):
        path = config_path('tokens.json')       # {"last": address, "tokens": {address: token}}
    try:
        kept = json.loads(read_secret(path, 'has your tokens; ask for new ones', warn_once))
        servers = dict(kept['servers']) if 'servers' in kept else {
            address: {'token': token} for address, token in kept['tokens'].items()}
        for address, fields in ((kept['last'], {}), *servers.items()):
            KnownServer(address, **fields)
        return {'last': kept['last'], 'servers': servers}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError,
            UsageError) as e:
        warn_once(f'{path} is damaged, so what it keeps is not used: {printable(str(e))}')
    return {'last': '', 'servers': {}}


def keep_server(server: KnownServer) -> None:
    """Remember SERVER, which said welcome; but never a token that the environment gives."""
    kept, path, address = kept_servers(), config_path('servers.json'), str(server.address)
    before = kept['servers'].get(address, {})
    token = server.token
    if token == os.environ.get('LOCALTUNNEL_TOKEN') or server.source == 'LOCALTUNNEL_JOIN':
        token = before.get('token', '')
    now = {'token': token, 'pin': server.pin, 'ca': server.ca, 'exact': server.exact}
    if (kept['last'], before) != (address, now):
        kept['servers'][address], kept['last'] = now, address
        try:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            write_secret(path, json.dumps(kept, indent=1).encode())
            with contextlib.suppress(FileNotFoundError):
                os.unlink(config_path('tokens.json'))
        except OSError as e:
            LOG.warning("can't write %s (%s), so the server is not remembered", path, e.strerror)


def token_of_environment(address: ServerAddress) -> str:
    """Return LOCALTUNNEL_TOKEN, where it may be meant for the server at ADDRESS; else ''."""
    token, meant = os.environ.get('LOCALTUNNEL_TOKEN', ''), os.environ.get('LOCALTUNNEL_SERVER')
    if (token and not is_loopback(address.site) and (meant or address.scheme == 'http')
            and (not meant or str(server_address(meant)) != str(address))):
        what = f'{address}, which LOCALTUNNEL_SERVER does not name'
        if address.scheme == 'http':
            LOG.warning('LOCALTUNNEL_TOKEN is not sent in clear to %s; set it, or give --token',
                        what)
            return ''
        LOG.warning('LOCALTUNNEL_TOKEN goes to %s', what)
    return token


def find_carrier(args: Args) -> Carrier | None:
    """Who brings visitors to a server in this process, if ARGS name someone.  Raises UsageError."""
    carriers = (annex.carrier(args) for annex in ANNEXES)
    return next((carrier for carrier in carriers if carrier), None)


def joined_server(code: str, ca: str = '', source: str = '--join') -> KnownServer:
    """Return the server that CODE names.  Raises UsageError."""
    address, token, pin = read_code(code)
    return KnownServer(address, source, token, pin, ca)


def given_code(args: Args) -> str:
    """Return the code that --join or LOCALTUNNEL_JOIN gives, or ''.  Raises UsageError."""
    of = os.environ.get
    for right, *given in (('--join', args.server, args.token), (
            'LOCALTUNNEL_JOIN', of('LOCALTUNNEL_SERVER'), of('LOCALTUNNEL_TOKEN'))):
        if any(CODE.fullmatch(text or '') for text in given):
            raise UsageError('this is a whole code, with server and token in it: give it with '
                             + right)
    if args.join is ASK:
        code = ask('code: ')
        if not code:
            raise UsageError('--join needs the code that the server printed, or a terminal where '
                             'you can paste it')
        return code
    return args.join or ('' if args.server or args.local else of('LOCALTUNNEL_JOIN', ''))


def keep_joined(code: str) -> None:
    """Remember the server that CODE names, as if it had said welcome; a token of before stays."""
    server = joined_server(code)
    before = kept_servers()['servers'].get(str(server.address), {})
    server.token = server.token or before.get('token', '')
    keep_server(server)


def named_server(args: Args) -> KnownServer | None:
    """Return what `known_server` does, if --join does not say it."""
    kept = kept_servers()
    known = [(source, address) for source, address in (
        ('--server', args.server), ('LOCALTUNNEL_SERVER', os.environ.get('LOCALTUNNEL_SERVER')),
        ('this script', STAMPED_SERVER), ('remembered', kept['last'])) if address]
    if args.local or not known:
        if args.pin:
            raise UsageError('--pin needs an https server; give one with --server')
        return None
    source, address = known[0]
    place = server_address(address)
    fields = kept['servers'].get(str(place), {})
    return KnownServer(
        address, source, args.token or token_of_environment(place) or fields.get('token', ''),
        args.pin or fields.get('pin', ''), args.ca or fields.get('ca', ''),
        bool(args.pin) or fields.get('exact', False))


def known_server(args: Args) -> KnownServer | None:
    """Return the server that ARGS mean, with what is typed, else kept; None: one in this process.

    Raises UsageError.
    """
    if find_carrier(args):
        return None
    if args.join and (args.server or args.token or args.pin):
        raise UsageError('a code has server, token and pin in it, so --join goes with none of '
                         '--server, --token and --pin')
    if args.local and (args.join or args.server or args.public):
        raise UsageError('--local stays on this machine, so it goes with none of --join, --server '
                         'and --public')
    code = given_code(args)
    known = joined_server(code, args.ca or '', '--join' if args.join else 'LOCALTUNNEL_JOIN'
                          ) if code else named_server(args)
    if args.public and known is None:
        raise UsageError('--public needs a server, and none is known; give --server URL, or --join '
                         'with the code that a server printed')
    if args.public and known and is_loopback(known.address.site):
        raise UsageError(f'--public needs a server that others reach, and {known.address} '
                         f'({known.source}) is on this machine; give --server URL')
    return known


FIRST_LOCAL_PORT = 4080         # of the server that a client starts for itself


async def first_of(*work: Awaitable[Any]) -> Any:
    """Wait until one of WORK is done, and end the others; return its result, or raise it."""
    tasks: list[Any] = [asyncio.ensure_future(one) for one in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return [task.result() for task in done][0]
    finally:
        for task in tasks:
            await end_task(task)


def make_server(runtime: Runtime, domain: str, leases: Leases, log: Observer, only: bool,
                limits: tuple[int, float] = (MAX_TUNNELS, 0.0), **options: Any) -> Server:
    """A server as annexes want any; ONLY: it has one http tunnel.  OPTIONS: see Server."""
    server = Server(runtime, domain, log, leases=leases, limits=Limits(runtime, *limits),
                    doors=Doors(runtime), pages=Pages(), onward=Onward(domain), **options)
    if only:
        server.tunnels.only = OnlyOne(server)
    for annex in ANNEXES:
        annex.at_any_server(server)
    return server


async def start_local_server(runtime: Runtime, target: Target) -> tuple[Server, KnownServer]:
    """Start a server on loopback for this process alone, on the first free port."""
    server = make_server(runtime, 'localhost', Leases(Tokens(open=True)), Observer(), only=True,
                         drain=LINGER, budget=process_budget())
    for port in range(FIRST_LOCAL_PORT, 65536):
        if port == target.port and target.local:
            continue
        try:
            sockets = bind('localhost', port)
        except OSError:
            continue
        for sock in sockets:
            await server.listen(sock)
        return server, KnownServer(f'http://localhost:{port}')
    raise LocaltunnelError('no port is free on this machine')


def find_target(args: Args) -> Target:
    """What the tunnel leads to.  Raises UsageError."""
    targets = (annex.target(args) for annex in ANNEXES)
    return next((target for target in targets if target), None) or parse_target(args.target)


def check_client_options(args: Args, target: Target, known: KnownServer | None) -> None:
    """Raise UsageError or Refused for options that make no sense; warn of what is not safe."""
    if args.release and not (args.name and known):
        raise UsageError('--release needs --name, and a server to give the name back to')
    if args.release and args.after:
        raise UsageError('--release opens no tunnel, so it runs no command beside it')
    if target.kind != 'http' and not known:
        raise UsageError('--tcp needs a server; give one with --server')
    if args.name:
        check_name(args.name)
    if args.ca:
        client_tls(args.ca)     # a mistake in it is told, whether or not anything speaks TLS
    if known and known.address.scheme == 'http' and not is_loopback(known.address.site):
        warn_once(f'the connection to {known.address} is not encrypted: anyone on the path can '
                  'read everything, even your token and the proof of your name')


def make_app(runtime: Runtime, args: Args, target: Target, server: KnownServer,
             observer: ClientObserver, seen: Any = ()) -> App:
    """The app at TARGET, for a client of SERVER."""
    tls = tls_to(target, args.ca or server.ca, not (args.insecure or target.local))
    app = App(runtime, target, Upstreams(runtime, target, tls), observer, Words(), args.timeout)
    app.seen = seen
    for annex in ANNEXES:
        annex.at_client(args, app, server.address)
    return app


class Dialer:
    """Connects a client to its server, whose certificate is checked."""

    def __init__(self, server: KnownServer, app: App) -> None:
        self._server, self._app = server, app
        self._tls = tls_to(server.address, server.ca, not server.pin)

    async def dial(self, timeout: float) -> Connection:
        """Return a new connection.  Raises Refused.

        A server that made a code with a pin had no certificate of an authority yet.  The day it
        gets one, that takes the place of the pin, or every member would need a new code.
        """
        server, runtime = self._server, self._app.runtime
        try:
            return await dial_server(runtime, server.address, self._tls, server.pin, timeout)
        except Refused:
            if server.pin and not server.exact:
                with contextlib.suppress(LocaltunnelError, OSError, asyncio.TimeoutError):
                    tls = tls_to(server.address, server.ca)
                    connection = await dial_server(runtime, server.address, tls, '', timeout)
                    self._tls, server.pin = tls, ''
                    self._app.observer.note(f'{server.address} has a certificate of an authority '
                                            'now, which takes the place of its pin')
                    return connection
            raise


async def look_at(app: App) -> None:
    """Give a hint if APP is not there yet."""
    try:
        (await app.connect()).close()
    except HopFailed as e:
        app.observer.hint(f'{e}; visitors get a page that says so until your app is up')


def make_client(app: App, args: Args, server: KnownServer, key: bytes) -> Client:
    """A client of SERVER that serves from APP."""
    runtime, address = app.runtime, server.address
    serve = functools.partial(runtime.begin, app.kinds[app.target.kind])
    begin = functools.partial(address.session, runtime, Budget(2 * SESSION_BUDGET),
                              frame_lines() if args.verbose else None, address.window, serve)
    more = {word: said for annex in ANNEXES for word, said in annex.hello(args, key).items()}
    return Client(app, address, key, token=server.token, dial=Dialer(server, app).dial,
                  backoff=Backoff(runtime.now(), args.once), begin=begin, name=args.name,
                  share=args.share, release=args.release, wants=address.wants, **more)


def terminal_of(args: Args, target: Target, known: KnownServer,
                first: Callable[[], None] | None = None, keys: Actions | None = None) -> Terminal:
    """Who tells the user of the tunnel that ARGS mean, which leads from the server KNOWN.

    FIRST is called when it is there; else that server is remembered.
    """
    carrier, here = find_carrier(args), not known.source
    server, source = (carrier.name, 'carrier') if carrier else (str(known.address), known.source)
    about = {'target': target.text, 'server': server, 'source': source, 'public': source != '',
             'protected': bool(getattr(args, 'auth', None)),
             'allow': [str(net) for net in getattr(args, 'allow', ())]}
    return Terminal(args, about, first or (lambda: None if here else keep_server(known)), keys)


Watching = TypeVar('Watching', bound=ClientObserver)


@contextlib.asynccontextmanager
async def wired(runtime: Runtime, args: Args, target: Target, known: KnownServer | None, key: bytes,
                observe: Callable[[KnownServer], Watching], seen: Any = ()
                ) -> AsyncIterator[tuple[App, Client, Watching]]:
    """The app at TARGET, a client of the server KNOWN, or of one in this process, and who watches.

    OBSERVE makes the latter.  SEEN is what is kept of other apps, where this one joins them.
    Afterwards open requests finish.
    """
    async with contextlib.AsyncExitStack() as stack:
        server, carrier = None, find_carrier(args)
        if known is None:
            server, known = await start_local_server(runtime, target)
            stack.push_async_callback(server.stop)
        observer = observe(known)
        app = make_app(runtime, args, target, known, observer, seen)
        stack.callback(app.close)
        client = make_client(app, args, known, key)
        if server:
            server.pages.page = app.words.page
            if carrier:
                carrier.carry(app, client, server)
        stack.push_async_callback(client.stop)
        yield app, client, observer


def as_client(args: Args, runtime: Runtime,
              target: Target) -> tuple[KnownServer, App, Client] | None:
    """What `client` would make of ARGS, to try TARGET once; None where no server is known."""
    typed = make_parser().parse_args(['client', '--', 'echo'])
    vars(typed).update(vars(args), once=True)
    known = known_server(typed)
    if known is None:
        return None
    app = make_app(runtime, typed, target, known, ClientObserver())
    return known, app, make_client(app, typed, known, make_key())


# ------------------------------------------------------------------------------------------------
# 64. Python
#
# A tunnel inside another program.  It runs in a thread with a loop of its own, so that it serves
# whatever the program does meanwhile, and starts in a notebook or a running loop as anywhere.  It
# prints nothing, and leaves signals alone; the logger "localtunnel" has what a user would read.
# ------------------------------------------------------------------------------------------------

# No keywords: these are about what is printed, or open no tunnel, or several.
NOT_FOR_PROGRAMS = {'help', 'json', 'quiet', 'verbose', 'release', 'config'}


def client_args(target: object, options: dict[str, object]) -> Args:
    """What the command line would make of TARGET and of OPTIONS, each by its name there.

    Raises TypeError for a name that is not known, and UsageError.
    """
    parser = make_parser()
    known = {action.dest: action for action in parser.commands['client']._actions
             if action.option_strings and action.dest not in NOT_FOR_PROGRAMS}
    words: list[str] = []
    for name, value in options.items():
        if name not in known:
            close = spelled(name, [*known, *NOT_FOR_PROGRAMS], lambda text: None)
            raise TypeError(f'tunnel() has no option {name!r}'
                            + (f'; did you mean {close!r}?' if close != name else ''))
        word = known[name].option_strings[0]
        if known[name].nargs == 0:
            words += [word] if value else []
        elif value is not None:
            values = value if isinstance(value, (list, tuple)) else [value]
            words += [f'{word}={one}' for one in values]
    return parser.parse_args(['client', *words, str(target)])


class Life(ClientObserver):
    """A tunnel from its start to its end, and the thread in which it runs."""

    def __init__(self, args: Args, target: Target,
                 on_state: Callable[[str], object] | None) -> None:
        self._args, self._target, self._on_state = args, target, on_state
        self.url = ''               # once there is one
        self.state = 'new'          # then "starting", "connected" and "lost", "ended"
        self.error: LocaltunnelError | None = None      # what ended it, unless it was closed
        self.exchanges: Sequence[Any] = ()
        # Done when the tunnel is there, or can't be; and when it has ended.
        self.begun: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.over: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.thread = threading.Thread(target=self._run, name='localtunnel', daemon=True)

    def __repr__(self) -> str:
        why = f': {self.error}' if self.error else ''
        url = f'{self.url} -> ' if self.url else 'to '
        return f'<tunnel {url}{self._target.text}, {self.state}{why}>'

    def start(self) -> None:
        """Begin.  Raises UsageError."""
        self._known = known_server(self._args)
        check_client_options(self._args, self._target, self._known)
        self._key = load_key()
        for future in (self.begun, self.over):
            future.set_running_or_notify_cancel()       # who waits in a loop can't cancel it
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda _, context: LOG.error(
            context['message'], exc_info=context.get('exception')))
        self._stop = self._loop.create_future()
        self.state = 'starting'
        atexit.register(self.forgotten, LINGER)     # or visitors would wait for its return
        self.thread.start()

    def end(self) -> bool:
        """Ask it to end, from any thread; return True if it can be waited for.

        Nothing is to end before the start, after the end, and in a fork of the process.
        """
        if not self.thread.is_alive():
            return False
        with contextlib.suppress(RuntimeError):         # it is ending by itself
            self._loop.call_soon_threadsafe(self._stop.cancel)
        return self.thread is not threading.current_thread()

    def forgotten(self, patience: float = 0.0) -> None:
        """End it, as nobody can close it any more; wait for that as long as PATIENCE."""
        if self.state != 'ended' and self.end():
            warnings.warn(f'unclosed {self!r}', ResourceWarning, stacklevel=2)
            self.thread.join(patience)

    def check(self) -> None:
        """Raise what ended it, if anything did, or that it never began."""
        if self.state == 'new':
            raise LocaltunnelError('the tunnel has not been started; call start()')
        if self.error is not None:
            raise self.error.again()

    # In its thread.

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except LocaltunnelError as e:
            self.error = e.again()
            if self.begun.done():       # else start raises it
                LOG.error('the tunnel has ended: %s', e)
        except Exception as e:      # a fault of ours
            self.error = LocaltunnelError(f'the tunnel broke: {e!r}')
            LOG.exception('the tunnel broke')
        finally:
            self._loop.close()
            atexit.unregister(self.forgotten)
            self._become('ended')
            for future in (self.begun, self.over):
                if not future.done():
                    future.set_result(None)

    async def _serve(self) -> None:
        """Be a tunnel until it is to end.  Raises what ends it before."""
        args, runtime = self._args, Runtime(self._loop)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(runtime.close)
            app, self._client, _ = await stack.enter_async_context(
                wired(runtime, args, self._target, self._known, self._key, lambda _: self))
            self.exchanges = app.seen
            watched = functools.partial(LOG.info, 'what passes can be seen at %s')
            for annex in ANNEXES if getattr(args, 'inspect', None) else ():
                await annex.beside(args, app, watched)      # else nobody asked for a page
            self._client.backoff.once = True
            with contextlib.suppress(asyncio.CancelledError):       # of _stop
                await first_of(self._client.run(), self._stop)

    def _become(self, state: str) -> None:
        if state != self.state:
            self.state = state
            try:
                if self._on_state:
                    self._on_state(state)
            except Exception:       # it is not ours, and must harm nothing
                LOG.exception('on_state failed')

    # What a client tells.

    def ready(self, url: str, user: str, round_trip: float) -> None:
        self.url = url
        LOG.info('%s -> %s', url, self._target.text)
        if self._known and self._args.join:
            keep_server(self._known)
        self._client.backoff.once = self._args.once     # from now on it reconnects
        self._become('connected')
        self.begun.set_result(None)

    def lost(self, why: str, seconds: float) -> None:
        if self.state != 'lost':
            LOG.warning('%s; trying again', why)
        self._become('lost')

    def back(self, url: str) -> None:
        self.url = url
        LOG.info('connected again: %s', url)
        self._become('connected')

    def note(self, text: str, event: str = 'note', **facts: str) -> None:
        LOG.info('%s%s', text, in_text(facts))

    def hint(self, text: str) -> None:
        LOG.warning('hint: %s', text)

    def also(self, name: str, text: str) -> None:
        LOG.info('%s', text)


class tunnel:
    """A tunnel inside a program: `with tunnel(8000) as t: print(t.url)`, or `async with`.

    Without `with` there are start() and close(), or `await t` and aclose().  OPTIONS are those of
    the command line, such as server='t.example.com', auth=['ann:secret'], share=True; what it would
    refuse is a LocaltunnelError with the same sentence.  A tunnel that ended may be started again.

    ON_STATE is called with "connected", "lost" and "ended", ON_EXCHANGE with each exchange that
    has ended, both in the tunnel's own thread.
    """

    def __init__(self, target: int | str | os.PathLike[str], *,
                 on_exchange: Callable[[Any], object] | None = None,
                 on_state: Callable[[str], object] | None = None, **options: object) -> None:
        if not LOG.handlers:
            LOG.addHandler(logging.NullHandler())
        args = client_args(target, options)
        args.on_exchange = on_exchange
        self._make = functools.partial(Life, args, find_target(args), on_state)
        self._life = self._make()
        self._watch: weakref.finalize[Any, tunnel] | None = None

    def __repr__(self) -> str:
        return repr(self._life)

    @property
    def url(self) -> str:
        """Where visitors come; '' before the start."""
        return self._life.url

    @property
    def public(self) -> bool:
        """True if the URL leads here from other machines."""
        return is_public(self.url)

    @property
    def connected(self) -> bool:
        """True while visitors can come."""
        return self._life.state == 'connected'

    @property
    def error(self) -> LocaltunnelError | None:
        """What ended it; None while it runs, and if it was closed."""
        return self._life.error

    @property
    def exchanges(self) -> Sequence[Any]:
        """The latest of what has passed, the newest last."""
        return self._life.exchanges

    def _begin(self) -> Life:
        if self._life.state == 'ended':
            self._life = self._make()
        life = self._life
        if life.state == 'new':
            life.start()
            if self._watch:
                self._watch.detach()
            self._watch = weakref.finalize(self, life.forgotten)
            self._watch.atexit = False
        return life

    # In any thread.

    def start(self) -> tunnel:
        """Open the tunnel, if it is not open; return it once visitors can come."""
        life = self._begin()
        try:
            life.begun.result()
            life.check()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """End it, if it runs, and wait until open requests have finished."""
        if self._life.end():
            self._life.thread.join()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended, at most TIMEOUT seconds; return whether it has.

        Raises what ended it, unless it was closed.
        """
        self._life.check()
        concurrent.futures.wait([self._life.over], timeout)
        self._life.check()
        return self._life.over.done()

    def __enter__(self) -> tunnel:
        return self.start()

    def __exit__(self, kind: object, *rest: object) -> None:
        self.close()
        if kind is None:
            self._life.check()

    # In a running loop, which goes on meanwhile.

    def __await__(self) -> Generator[Any, None, tunnel]:
        return self.__aenter__().__await__()

    async def aclose(self) -> None:
        """As close does."""
        if self._life.end():
            await asyncio.wrap_future(self._life.over)

    async def ended(self) -> None:
        """As wait does."""
        self._life.check()
        await asyncio.wrap_future(self._life.over)
        self._life.check()

    async def __aenter__(self) -> tunnel:
        life = self._begin()
        try:
            await asyncio.wrap_future(life.begun)
            life.check()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(self, kind: object, *rest: object) -> None:
        await self.aclose()
        if kind is None:
            self._life.check()


# ------------------------------------------------------------------------------------------------
# 65. Configuration file
#
# What is typed may stand in a file: in the section [server], or in one for each tunnel of a client.
# Its keys are the names of options, and what is typed wins.  A mistake is told with file, line and
# cure, and nothing is begun or changed before all is right.
# ------------------------------------------------------------------------------------------------

SECRET_KEYS = {'token', 'join', 'auth'}
# By the parser's name for it, what is wrong with a line; else it is neither of the two.
FAULTS = {'MissingSectionHeaderError': 'above this a section must begin, such as [web] or '
                                       '[server]',
          'DuplicateSectionError': 'this section stands above already; join the two, or give it '
                                   'another name',
          'DuplicateOptionError': 'this key stands above already, in the same section; take one '
                                  'out, or write its value below the first, further in'}
SECTION = re.compile(r'\w[\w.-]*')     # a tunnel's name: it is typed, and stands in columns


class ConfigFile:
    """A configuration file as it was read: `sections` has line and value, by section and key."""

    def __init__(self, path: str) -> None:
        """Raises UsageError."""
        self.path, data = path, b''
        try:
            with open_file(path) as f:
                mode, data = os.fstat(f.fileno()).st_mode, f.read()
            self._text = data.decode('utf-8-sig')
        except OSError as e:
            raise UsageError(f"can't read {printable(path)}: {e.strerror}") from e
        except UnicodeDecodeError as e:
            raise self.error(data[:e.start].count(b'\n') + 1, 'this is not UTF-8; save the file as '
                             'UTF-8') from e
        if '\0' in self._text:
            raise UsageError(f'{path} is not a text; save it as UTF-8')
        self.sections = self._parsed()
        if os.name == 'posix' and mode & 0o007 and any(
                SECRET_KEYS & section.keys() for section in self.sections.values()):
            warn_once(f'others can read {path}, and anyone with a copy has what is secret in it; '
                      f'type: chmod o= {path}')

    def _parsed(self) -> dict[str, dict[str, tuple[int, str]]]:
        import configparser
        lines, keys = io.StringIO(self._text, newline=None).readlines(), []
        unread = iter(lines)

        def key(name: str) -> str:      # the parser tells no lines, but asks here for each key
            keys.append(len(lines) - operator.length_hint(unread))
            return name
        parser = configparser.RawConfigParser(default_section='')
        parser.optionxform = key    # type: ignore[method-assign, assignment]
        try:
            parser.read_file(unread, self.path)
        except configparser.Error as e:
            line = getattr(e, 'lineno', None) or getattr(e, 'errors', [(0, '')])[0][0]
            raise self.error(line, FAULTS.get(
                type(e).__name__, 'a line must be KEY = VALUE, or [SECTION]')) from e
        numbers = iter(tuple(keys))
        return {section: {key: (next(numbers), value) for key, value in parser.items(section)}
                for section in parser.sections()}

    def error(self, line: int, text: str) -> UsageError:
        """The error for what is wrong in LINE."""
        text = f'{self.path}, line {line}: {text}'
        return UsageError('\n'.join(map(printable, text.split('\n'))))

    def fault(self, section: str, text: str, *keys: str) -> UsageError:
        """The error for what is wrong in SECTION, by an option in TEXT or by one of KEYS."""
        lines = [self.sections[section][key][0] for key in (*re.findall('--([a-z-]+)', text), *keys)
                 if key in self.sections[section]]
        begins = [line.strip().startswith(f'[{section}]') for line in self._text.split('\n')]
        return self.error([*lines, 1 + begins.index(True)][0], text)

    def words(self, section: str, parser: Parser, command: str, unfit: Container[str],
              typed: Container[str]) -> list[str]:
        """What SECTION says, as words of COMMAND, but for the options that are TYPED.

        Raises UsageError for what it can't mean, such as keys that are UNFIT.
        """
        known, words = {(action.option_strings or [action.dest])[-1].lstrip('-'): action
                        for action in parser.commands[command]._actions}, []
        for key, (line, value) in self.sections[section].items():
            meant = spelled(key, known, lambda text: None)
            if key in unfit:
                raise self.error(line, f'{key} belongs on the command line')
            if key not in known:
                raise self.error(line, f'there is no option {key}; ' + (
                    f'did you mean {meant}?' if meant != key else
                    f'see localtunnel.py {command} --help'))
            try:
                own = self._words(known[key], key, [one for one in value.split('\n') if one])
                parser.parse_args([command, *own, *['echo'] * (
                    command == 'client' and key != 'target')])
            except UsageError as e:
                several = ',' in value and isinstance(known[key], argparse._AppendAction)
                raise self.error(line, str(e) + '; several values stand in lines of their own, '
                                 'further in' * several) from e
            words += [] if f'--{key}' in typed else own
        return words

    @staticmethod
    def _words(action: argparse.Action, key: str, values: list[str]) -> list[str]:
        if not values:
            raise UsageError(f'{key} is empty; give it a value, or take the line out')
        if action.nargs in (0, '?') and action.const is not ASK and values in (['yes'], ['no']):
            return [f'--{key}'] * (values == ['yes'])
        if action.nargs == 0:
            raise UsageError(f'{key} takes yes or no')
        if len(values) > 1 and not isinstance(action, argparse._AppendAction):
            raise UsageError(f'{key} takes one value, and "{values[1]}" is further in, so it '
                             f'belongs to it; begin that where {key} begins, or take it out')
        for one in values:
            if re.search(r'\s[#;]', one):
                raise UsageError(f'a comment needs a line of its own; here it is a part of {key}')
            if one[1:] and one[0] == one[-1] in ('"', "'"):
                raise UsageError(f'take out the quotes; here they are a part of {key}')
        return [f'--{key}={one}' if action.option_strings else one for one in values]


def options_in(words: Iterable[str]) -> set[str]:
    """The options among WORDS."""
    return {word.partition('=')[0] for word in words}


# Of a server.

def server_args(words: Sequence[str]) -> Args:
    """What WORDS say, with the section [server] of the file that they name.  Raises UsageError."""
    parser = make_parser()
    args = parser.parse_args(words)
    file, typed = ConfigFile(args.config), parser.commands[args.command].typed
    if 'server' not in file.sections:
        raise UsageError(f'{args.config} has no section [server]; write one, with the options of '
                         'the server as its keys')
    own = file.words('server', parser, 'server', {'help', 'config'}, options_in(typed))
    said = [words[0], *own, *words[1:]]
    args = parser.parse_args(said)
    args.said, args.again = said, functools.partial(server_args, words)
    return args


class ServerFile(Source):
    """The configuration file of a server.  Some of it can be changed while that runs."""
    what = 'configuration'
    LIVE = {'--drain', '--hold', '--max-tunnels', '--rate'}

    def __init__(self, args: Args, server: Server) -> None:
        self._args, self._server = args, server

    def reload(self) -> str | None:
        server = self._server
        try:
            new = self._args.again()
        except UsageError as e:
            return f'nothing was changed: {e}'
        server.tunnels.hold, server.drain = new.hold, new.drain
        server.limits.rate, server.limits.most = new.rate, new.max_tunnels
        rest = options_in({*new.said} ^ {*self._args.said}) - self.LIVE
        if rest:
            server.log.note(f'{" and ".join(sorted(rest))} changed in {new.config}, which takes a '
                            'restart; SIGUSR2 does that without a failed request')
        return None


# Of a client.

class Plan(NamedTuple):
    """What a section means."""
    args: Args
    target: Target
    known: KnownServer | None
    fault: Callable[..., UsageError]        # the error for what is wrong with it

    @property
    def place(self) -> tuple[object, ...]:
        """What it has for itself alone: a name, or a port, of a server."""
        target, name = self.target, self.args.name or self.target.public_port or self.target.label
        server = str(self.known.address) if self.known else self.args   # that has but one tunnel
        return server, target.kind, name


def plan_of(file: ConfigFile, name: str, parser: Parser, words: Sequence[str]) -> Plan:
    """What the section NAME of FILE means, which says WORDS.  Raises UsageError."""
    at, fault = '', functools.partial(file.fault, name)
    try:
        if not SECTION.fullmatch(name):
            raise UsageError('the name of a tunnel has letters, digits, ".", "-" and "_" only')
        args = parser.parse_args(words)
        args.said, args.tunnel, at = words, name, 'target'
        target = find_target(args)
        at = 'join' if args.join else 'server'
        known = known_server(args)
        at = 'name'
        check_client_options(args, target, known)
    except LocaltunnelError as e:
        raise fault(str(e), at) from e
    return Plan(args, target, known, fault)


def plans_of(args: Args, before: Mapping[str, Plan]) -> dict[str, Plan]:
    """What the sections mean that ARGS name, or all; as BEFORE, where nothing has changed.

    Raises UsageError.
    """
    unfit, parser = set(NOT_FOR_PROGRAMS), make_parser()
    for annex in ANNEXES:
        if annex.for_all:
            annex.client_options(lambda name, **_: unfit.add(name[2:]))
    parser.parse_args(args.said)
    typed = [word for word in parser.commands['client'].typed if word[:9] != '--config=']
    file = ConfigFile(args.config)
    plans: dict[str, Plan] = {}
    names = [name for name in file.sections if name != 'server']
    for name in args.target or names:
        if name not in names:
            raise UsageError(printable(f'{file.path} has no section [{name}]; it has '
                                       f'{" ".join(map("[{}]".format, file.sections))}'))
        if 'target' not in file.sections[name]:
            raise file.fault(name, f'[{name}] needs a target, such as: target = 8000')
        words = ['client', *file.words(name, parser, 'client', unfit, options_in(typed)), *typed]
        plan = before[name] if name in before and before[name].args.said == words else (
            plan_of(file, name, parser, words))
        for same, other in plans.items():
            if other.place == plan.place and not (plan.args.share or name == same):
                raise plan.fault(f'[{name}] would have the same name as [{same}]; give it another '
                                 'one, with name = NAME', 'name', 'tcp-port')
        plans[name] = plan
    if not plans:
        raise UsageError(f'{file.path} has no tunnel; begin one with [web], and below it '
                         'target = 8000')
    return plans


class Section:
    """A tunnel of the file, from its start to its end."""
    code: int | None = None             # the exit code, once it has ended
    replaced = False                    # it goes on until its successor is there

    def __init__(self, plan: Plan, before: Section | None) -> None:
        """Once it is there, or has failed, BEFORE is to stop."""
        self.plan, self.stop = plan, asyncio.Event()
        self.relieve: Callable[[], None] = before.stop.set if before else lambda: None
        self.stack = contextlib.AsyncExitStack()
        self.wired: tuple[App, Client, Terminal]        # while it runs

    async def run(self) -> None:
        """Keep it up until it is to stop, or fails."""
        code, why, (app, client, terminal) = 0, '', self.wired
        self.stack.push_async_callback(end_task, app.runtime.spawn(look_at(app)))
        try:
            await first_of(client.run(), self.stop.wait())
        except LocaltunnelError as e:
            code, why = (0, '') if self.replaced else (exit_code(e), str(e))
        finally:
            self.relieve()
            await self.stack.aclose()
            self.code = code
        terminal.ended(app.exchanges, *client.carried, why, code)


class Sections:
    """All tunnels of the file, in one process: what ends one does not end the others."""

    def __init__(self, runtime: Runtime, args: Args) -> None:
        self._runtime, self._args, self._key = runtime, args, load_key()
        self.terminal = Terminal(args, {})
        self._seen: Any = ()            # what the inspector of all of them keeps
        self._inspector = ''            # its URL
        self._turn = asyncio.Lock()     # for who changes what runs
        self._sections: dict[str, Section] = {}     # as the file has them; some may have ended
        self._tasks: set[asyncio.Task[None]] = set()        # of those that run, or drain
        self.over = asyncio.Event()     # there are none any more

    def running(self) -> dict[str, Section]:
        """Those that have not ended."""
        return {name: one for name, one in self._sections.items() if one.code is None}

    def _watched(self, url: str) -> None:
        self._inspector = url
        self.terminal.note(f'what passes can be seen at {url}')

    async def _open(self, section: Section) -> None:
        """Wire it.  Raises LocaltunnelError."""
        args, target, known, fault = section.plan
        observe = functools.partial(
            terminal_of, args, target, first=section.relieve, keys=self.terminal.keys)
        try:
            section.wired = await section.stack.enter_async_context(wired(
                self._runtime, args, target, known, self._key, observe, self._seen))
        except UsageError as e:
            raise fault(str(e)) from e
        self._seen = section.wired[0].seen

    async def change(self, plans: Mapping[str, Plan]) -> None:
        """Let PLANS run, and nothing else.  Raises LocaltunnelError where it changes nothing."""
        running = self.running()
        new = {name: Section(plan, running.get(name)) for name, plan in plans.items()
               if name not in running or running[name].plan is not plan}
        try:
            for section in new.values():
                await self._open(section)
            for annex in () if self._sections else ANNEXES:
                await annex.beside(self._args, section.wired[0], self._watched)
        except BaseException:
            for section in new.values():
                await section.stack.aclose()
            raise
        self._sections = {name: new.get(name) or running[name] for name in plans}
        changed = [name for name in running if name in new]
        gone = [name for name in running if name not in plans]
        for name in changed:
            running[name].replaced = True
        for name in gone:
            running[name].stop.set()
        for section in new.values():
            if self._inspector:
                section.wired[2].watched(self._inspector)
            task = self._runtime.spawn(section.run())
            self._tasks.add(task)
            task.add_done_callback(self._ended)
        if running:
            self.terminal.note(
                f'{self._args.config} read again', event='reload',
                new=' '.join(name for name in new if name not in running),
                changed=' '.join(changed), gone=' '.join(gone))

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not self._tasks:
            self.over.set()

    async def reload(self) -> None:
        """Read the file again."""
        async with self._turn:
            try:
                await self.change(plans_of(self._args, {
                    name: section.plan for name, section in self.running().items()}))
            except LocaltunnelError as e:
                self.terminal.note(f'nothing was changed: {e}')

    def list(self) -> None:
        """Show where the tunnels lead, and what the keys do."""
        for name, section in self.running().items():
            app, client, _ = section.wired
            put(sys.stdout, f'  {name:<10}  {client.url or "not there yet"} -> {app.target.text}\n')
        self.terminal.help()

    async def end(self) -> int:
        """End all; return the exit code: of the first that failed, if any did."""
        for section in self._sections.values():
            section.stop.set()
        if self._tasks:
            await asyncio.wait(self._tasks)
        return next(filter(None, (section.code for section in self._sections.values())), 0)


async def run_clients(runtime: Runtime, stop: asyncio.Event, args: Args,
                      plans: Mapping[str, Plan]) -> int:
    """Keep the tunnels of a file up, at first PLANS, until STOP is set or all have failed."""
    sections, typed = Sections(runtime, args), is_terminal(sys.stdin)

    def again() -> None:
        runtime.spawn(sections.reload())

    def hung_up() -> None:
        if typed and not is_terminal(sys.stdin):        # the window was closed
            stop.set()
        else:
            again()
    with contextlib.ExitStack() as last:
        try:
            await sections.change(plans)
            # A carrier may ask for a password.
            keys = None if any(find_carrier(plan.args) for plan in plans.values()) else (
                sections.terminal.listen(runtime, stop.set))
            if keys:
                last.callback(keys.close)
                sections.terminal.keys['r'] = 'reads the file again', again
                sections.terminal.keys['?'] = 'lists the tunnels', sections.list
                sections.terminal.help()
            if not (args.json or args.quiet):
                last.callback(Pulse(runtime, lambda: [
                    section.wired for section in sections.running().values()]).close)
            if hasattr(signal, 'SIGHUP'):
                runtime.loop.add_signal_handler(signal.SIGHUP, hung_up)
            await first_of(stop.wait(), sections.over.wait())
        finally:
            code = await sections.end()
    return code


# ------------------------------------------------------------------------------------------------
# 66. Command line
#
# What the commands do, from their start to their end.
# ------------------------------------------------------------------------------------------------

# Running until told to stop.

def on_signals(loop: asyncio.AbstractEventLoop, tell: Callable[[int], None]) -> None:
    """TELL is called with each SIGINT and SIGTERM from now on, and nobody else is."""
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, tell, number)
        except NotImplementedError:         # Windows
            signal.signal(number, lambda number, _: loop.call_soon_threadsafe(tell, number))


def leave_at_once(code: int) -> NoReturn:
    """End the process, whatever is under way."""
    give_terminal_back()
    for act in AT_LAST:
        act()
    os._exit(code)


def run(command: Callable[..., Coroutine[Any, Any, int | None]], *args: Any) -> int:
    """Run COMMAND; its event is set by the first SIGINT or SIGTERM, and the second ends at once.

    Returns its exit code.
    """
    async def body() -> int | None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()

        def asked(number: int) -> None:
            if stop.is_set():
                leave_at_once(0)
            clean_lines()
            stop.set()
        on_signals(loop, asked)
        runtime = Runtime(loop)
        logging.getLogger('asyncio').handlers = [Complaints()]
        share_tls_buffer(runtime.buffer)
        gc.freeze()         # what was made so far stays
        gc.set_threshold(10000, 20, 50)     # requests make much garbage but few cycles
        try:
            return await command(runtime, stop, *args)
        finally:
            give_terminal_back()
            await runtime.close()
    return asyncio.run(body()) or 0


# A command beside the tunnel.

NOT_FOUND, NOT_EXECUTABLE, SIGNALLED = 127, 126, 128        # exit codes, as of a shell
COMMAND_WAITS = 60.0            # for the tunnel: a server that restarts is back by then


def terminal_tells_children() -> bool:
    """Return True if Ctrl-C at a terminal interrupts not only this process, but what it runs."""
    if os.name == 'nt':
        return True
    try:
        with open('/dev/tty', 'rb', buffering=0) as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


class Beside:
    """A command that runs beside a tunnel, with the tunnel's URL in LOCALTUNNEL_URL.

    Standard input and output are its own, signals are for it, and its exit code is the client's.
    """

    def __init__(self, runtime: Runtime, words: Sequence[str],
                 preexec: Callable[[], None] | None = None) -> None:
        """PREEXEC is called in the new process."""
        self._words, self._preexec = words, preexec
        self._process: asyncio.subprocess.Process | None = None
        self._signal = 0                    # the last one that came
        self._signalled = asyncio.Event()
        if words:
            on_signals(runtime.loop, self._pass_on)

    def _pass_on(self, number: int) -> None:
        self._signal = number
        self._signalled.set()
        if self._process and self._process.returncode is not None:
            leave_at_once(self._code())     # the second one, while open requests finish
        if self._process and not (number == signal.SIGINT and terminal_tells_children()):
            self._tell(self._process, number)

    @staticmethod
    def _tell(process: asyncio.subprocess.Process, number: int) -> None:
        """Send a signal.  PROCESS's own way may take its exit code from asyncio, which says 255."""
        with contextlib.suppress(OSError):          # it has just ended
            os.kill(process.pid, number)

    def _code(self) -> int:
        code = (self._process.returncode if self._process else 0) or 0
        return SIGNALLED - code if code < 0 else code

    async def run(self, client: Client) -> int:
        """Run it, once CLIENT is welcome; return the exit code.  Without a command, wait.

        Raises LocaltunnelError if CLIENT isn't welcome in time.
        """
        if not self._words:
            await client.runtime.loop.create_future()
        program, *words = self._words
        try:
            await asyncio.wait_for(first_of(client.welcomed.wait(), self._signalled.wait()),
                                   COMMAND_WAITS)
        except asyncio.TimeoutError as e:
            raise LocaltunnelError(f'no tunnel came up in {COMMAND_WAITS:.0f} s, so '
                                   f'{printable(program)} was not run') from e
        if self._signal:
            return SIGNALLED + self._signal
        try:
            self._process = await asyncio.create_subprocess_exec(
                shutil.which(program) or program, *words,
                env={**os.environ, 'LOCALTUNNEL_URL': client.url}, preexec_fn=self._preexec)
        except OSError as e:
            missing = isinstance(e, FileNotFoundError)
            say(f"localtunnel.py: can't run {printable(program)}: "
                + ('there is no such program' if missing else plainly(e)))
            return NOT_FOUND if missing else NOT_EXECUTABLE
        if self._signal:                    # it came in between
            self._pass_on(self._signal)
        await self._process.wait()
        return self._code()

    async def end(self) -> None:
        """End it, if it still runs: the tunnel has failed for good."""
        if self._process and self._process.returncode is None:
            self._tell(self._process, signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), DRAIN)
            except asyncio.TimeoutError:
                with contextlib.suppress(ProcessLookupError):       # it has just ended
                    self._process.kill()        # Windows has no SIGKILL
            await self._process.wait()


def say_not_public(args: Args, what: str) -> None:
    """Say where this URL works, the ways out for WHAT, first the one that most people can go."""
    say(f'NOT PUBLIC: {"--local" if args.local else "no server is known"}, so this URL works '
        'on this machine only')
    say(f'  with a code of a server:  python3 localtunnel.py client {what} --join CODE')
    say(f'  by ssh, without a server: python3 localtunnel.py client {what} --via HOST')
    say('  for one of your own:      python3 localtunnel.py deploy HOST')
    if args.name:
        say(f'  --name {args.name} needs a server, too: here the tunnel has the whole host')


async def run_client(runtime: Runtime, stop: asyncio.Event, args: Args,
                     target: Target, known: KnownServer | None) -> int | None:
    """Keep the tunnel up until STOP is set, or the command beside it ends: with its exit code."""
    beside = Beside(runtime, args.after, args.preexec)
    if not args.after and hasattr(signal, 'SIGHUP') and (   # nohup ignores it
            signal.getsignal(signal.SIGHUP) == signal.SIG_DFL):
        runtime.loop.add_signal_handler(signal.SIGHUP, stop.set)    # the window was closed
    key, carrier = load_key(), find_carrier(args)
    if known is None and not carrier:       # first, whatever is wrong besides
        say_not_public(args, args.target)
    observe = functools.partial(terminal_of, args, target)
    with contextlib.ExitStack() as last:
        async with wired(runtime, args, target, known, key, observe) as (
                app, client, terminal), contextlib.AsyncExitStack() as stack:
            last.callback(lambda: terminal.ended(app.exchanges, *client.carried))
            for annex in () if args.release else ANNEXES:       # a release opens no tunnel
                await annex.beside(args, app, terminal.watched)
            keys = terminal.listen(runtime, stop.set, at_once=not carrier)
            if keys:
                last.callback(keys.close)       # only then: a second Ctrl-C is not echoed either
            if not (args.json or args.quiet):
                last.callback(Pulse(runtime, lambda: [(app, client, terminal)]).close)
            if not args.release:
                stack.push_async_callback(end_task, runtime.spawn(look_at(app)))
            stack.push_async_callback(beside.end)
            code: int | None = await first_of(client.run(), stop.wait(), beside.run(client))
    return code if args.after else None


def client_command(args: Args) -> int:
    args.preexec = with_this_limit()
    descriptor_limit()          # macOS begins with 256, and each request takes one
    if args.config:
        if args.after or args.release or args.join is ASK:
            raise UsageError('--config opens several tunnels, so it goes with none of -- COMMAND, '
                             '--release, and --join without CODE')
        plans = plans_of(args, {})
        for plan in plans.values():
            if not (plan.known or find_carrier(plan.args)):
                say_not_public(plan.args, f'--config {args.config}')
                break
        return run(run_clients, args, plans)
    if args.after:          # standard input and output are its own; what we say goes to stderr
        sys.stdin, sys.stdout = open(os.devnull), sys.stderr
    target, known = find_target(args), known_server(args)
    check_client_options(args, target, known)
    try:
        return run(run_client, args, target, known)
    except Refused as e:
        given = args.token or os.environ.get('LOCALTUNNEL_TOKEN')
        if (e.code != 'token' or e.final or given or not (known and is_terminal(sys.stderr))
                or (known.source in ('--join', 'LOCALTUNNEL_JOIN') and known.token)):
            raise
        said = ask(f'{e}\ntoken or code for {known.address}: ')
        if not said:
            raise
    if CODE.fullmatch(said):
        site, known = known.address.site, joined_server(said, known.ca)
        if known.address.site != site:
            raise UsageError(f'this code is for {known.address}, not for {site}; give it to --join')
    else:
        known.token = check_token(said)
    return run(run_client, args, target, known)


# The server's side.

def server_tokens(args: Args) -> tuple[Tokens, str]:
    """Return the tokens of a server, and the one that was made because none was given, or ''."""
    given = args.token or [
        check_token(token) for token in [os.environ.get('LOCALTUNNEL_TOKEN')] if token]
    local = is_loopback(args.domain) and is_loopback(args.bind)
    some = bool(given or getattr(args, 'token_file', None))
    if some or args.open or local:
        return Tokens(given, open=args.open or not some), ''
    path = os.path.join(args.state, 'token')
    if not os.path.exists(path):
        write_secret(path, secrets.token_hex(16).encode() + b'\n')
    try:
        made = check_token(read_secret(path, 'may open tunnels; remove it to get a new one',
                                       warn_once).decode('ascii').strip())
    except (OSError, ValueError, UsageError) as e:
        raise UsageError(f'{path} does not hold a token; delete it to get a new one') from e
    return Tokens([made]), made


def entrance(args: Args, port: int, tls: Tls | None) -> tuple[str, str]:
    """Return where clients come in: its URL, and a pin if no authority signed what it shows."""
    if args.trust_proxy:
        return f'https://{args.domain}', ''
    if tls and tls.port:
        where = authority('https', args.domain, tls.port)
        return f'https://{where}', tls.pin or pin_of(tls.context)
    return 'http://' + authority('http', args.domain, port), ''


def announce(args: Args, log: ServerLog, port: int, tls: Tls | None, made: str) -> None:
    """Say where the server listens, and what its users type."""
    clients, pin = args.entrance
    name = args.domain if is_address(args.domain) else 'NAME.' + args.domain
    visitors = clients
    if tls and not tls.shows(name) and not args.trust_proxy:
        visitors = 'http://' + authority('http', args.domain, port)
    if not is_loopback(args.domain) and visitors.startswith('http://') and (not tls or pin):
        log.note(f'HTTP ONLY: {args.domain} has no certificate, so Stripe, Slack and browser '
                 'features that need https will not work; add --acme EMAIL, or --cert and --key'
                 + ('. Clients connect over TLS all the same, checked by a pin' if pin else ''))
    ports = f'ports {port} and {tls.port}' if tls and tls.port else f'port {port}'
    log.note(f'listening on {ports}; tunnels will appear at '
             + visitors.replace(args.domain, name))
    seen = is_terminal(sys.stderr)      # else what is written may be kept, and read by others
    token = (made or (args.token or [''])[0]) if seen else ''
    if made and not seen:
        log.note(f'clients need the token in {os.path.join(args.state, "token")}')
    way = (f'--join {make_code(server_address(clients), token, pin)}' if token or pin else
           f'--server {clients}')
    log.note(f'to connect: python3 localtunnel.py client 8000 {way}')


# The server, from its start to its end.

async def run_server(runtime: Runtime, stop: asyncio.Event, args: Args,
                     tokens: Tokens, made: str) -> None:
    """Serve until STOP is set, or a successor does."""
    log = ServerLog(args.log_format == 'json')
    runtime.swept.add(log)
    server = make_server(runtime, args.domain, Leases(tokens), log, is_address(args.domain),
                         (args.max_tunnels, args.rate), hold=args.hold, drain=args.drain,
                         budget=args.buffer * MIB or process_budget(),
                         trace=frame_lines() if args.verbose else None)
    args.listening = Listening(inherited_sockets())
    sockets = args.listening.at(args.bind, args.port)
    args.sources = Sources(server)
    if args.config:
        args.sources.all.append(ServerFile(args, server))
    if args.trust_proxy:
        server.visitors.front = Front(args.trust_proxy)
    for annex in ANNEXES:
        await annex.at_server(args, server)
    for sock in sockets:
        await server.listen(sock)
    for port, unused in sorted(args.listening.inherited.items()):
        log.note(f'warning: a socket was passed that listens on port {port}, which is none of '
                 '--port, --tls-port, --admin and --tcp-ports; nobody answers there')
        for sock in unused:
            sock.close()
    port = sockets[0].getsockname()[1]
    args.entrance = entrance(args, port, server.tls)
    if hasattr(signal, 'SIGHUP'):       # before anybody can know that it listens
        runtime.loop.add_signal_handler(signal.SIGHUP, args.sources.reload)
    announce(args, log, port, server.tls, made)
    log.flush()
    await first_of(stop.wait(), *(annex.run(args, server) for annex in ANNEXES))
    log.note('finishing open requests; Ctrl-C again stops now')
    if stop.is_set():
        await server.leave()
    await server.refuse_clients()
    os.close(args.lock)         # from now on nothing is written into the folder but kept requests
    await server.stop(handed_over=not stop.is_set())
    log.flush()


def server_command(args: Args) -> int:
    local = is_loopback(args.domain)
    if args.bind is None:
        args.bind = 'localhost' if local else ''
    args.bind = args.bind.strip('[]')       # of an IPv6 address, as in a URL
    if args.port is None:
        args.port = 8080 if local else 80
    args.state = state_folder(args.state)
    with using(args.state):
        os.makedirs(args.state, mode=0o700, exist_ok=True)
        if not os.access(args.state, os.W_OK):
            raise PermissionError(errno.EACCES, 'Permission denied')
        args.lock = lock_folder(args.state)
        tokens, made = server_tokens(args)
    return run(run_server, args, tokens, made)


def command(words: Sequence[str]) -> int:
    """Do what WORDS say; return the exit code."""
    commands, parser = {'client': client_command, 'server': server_command}, make_parser()
    args = Args(command=words[0] if words else '', json='--json' in words)     # until parsed
    code, reason = 0, ''
    try:
        if any(re.search('[\ud800-\udfff]', word) for word in words):
            raise UsageError('the command line is not valid UTF-8')
        args = parser.parse_args(words)
        args.said = words
        if args.command != 'client' and getattr(args, 'config', None):
            args = server_args(words)
        args.as_client, args.remember, args.do = as_client, keep_joined, command
        args.known = parser.commands
        args.checks = lambda: [check for annex in ANNEXES for check in annex.checks(args)]
        code = int((commands.get(args.command) or args.run)(args))
    except KeyboardInterrupt:
        code = 0 if args.command in commands else SIGNALLED + signal.SIGINT
    except LocaltunnelError as e:
        mistyped = not getattr(args, 'config', None) and (
            isinstance(e, UsageError) or getattr(e, 'code', '') == 'bad_name')
        meant = did_you_mean(words, parser) if mistyped else ''
        reason = meant or str(e)
        say(f'localtunnel.py: {reason}')
        code = EXIT_CODES['usage'] if meant else exit_code(e)
    except SystemExit as e:         # of argparse
        code = int(e.code or 0)
    if args.command == 'client' and args.json:
        put(sys.stdout, event_line('end', code=code, reason=reason) + '\n')
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    LOG.handlers = [Complaints()]
    code = command(list(sys.argv[1:] if argv is None else argv))
    if not finish_writing():
        os._exit(code)      # Python would try again, wait for the reader, and end with 120
    return code


if __name__ == '__main__': sys.exit(main())
