//! Messages between the supervisor and a zygote, or a session's first process: fixed little-endian records over a
//! SEQPACKET socket.
//!
//! The other end is `python/zygote.py` or `python/session.py`. A snippet's process never holds this socket while code of
//! the snippet runs, so everything that arrives here was written by trusted code; it is checked all the same, and a message that makes no
//! sense is an error, never a panic.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

const REQUEST_BYTES: usize = 56;
const REPLY_HEAD_BYTES: usize = 32;
/// Longest reply: the head and the text of a fault.
const REPLY_BYTES: usize = 512;

const READY: u32 = 1;
const SPAWNED: u32 = 2;
const EXITED: u32 = 3;
const FAULT: u32 = 4;
const BEGUN: u32 = 5;
const TURN_ENDED: u32 = 6;

/// "Fork and run": sent with the descriptors of the code, standard output and standard error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) call: u32,
    pub(crate) tasks: u32,
    pub(crate) seed: u64,
    pub(crate) memory_bytes: u64,
    pub(crate) cpu_seconds: u64,
    pub(crate) tmp_bytes: u64,
    pub(crate) file_bytes: u64,
    pub(crate) open_files: u32,
    /// [`SESSION`] and [`ECHO`].
    pub(crate) flags: u32,
}

/// Begin a session instead of running a snippet.
pub(crate) const SESSION: u32 = 1;
/// Print the value of a last line that is an expression.
pub(crate) const ECHO: u32 = 2;

impl Request {
    fn encode(&self) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        let words = [self.seed, self.memory_bytes, self.cpu_seconds, self.tmp_bytes, self.file_bytes];
        let fields = [&self.call.to_le_bytes()[..], &self.tasks.to_le_bytes()]
            .concat()
            .into_iter()
            .chain(words.into_iter().flat_map(u64::to_le_bytes))
            .chain(self.open_files.to_le_bytes())
            .chain(self.flags.to_le_bytes());
        for (place, byte) in bytes.iter_mut().zip(fields) {
            *place = byte;
        }
        bytes
    }

    /// Sends the request with its descriptors: those of the code, standard output and standard error, or the socket of a
    /// session.
    pub(crate) fn send(&self, socket: BorrowedFd<'_>, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        send(socket, &self.encode(), descriptors)
    }
}

/// Sends a message with at most three descriptors.
fn send(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// What a session's first process is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Run a turn: sent with the descriptors of the code, standard output and standard error.
    Turn { echo: bool },
    /// End the turn that runs.
    EndTurn,
}

impl Order {
    /// Sends the order.
    pub(crate) fn send(self, socket: BorrowedFd<'_>, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let (kind, flags): (u32, u32) = match self {
            Self::Turn { echo } => (1, if echo { ECHO } else { 0 }),
            Self::EndTurn => (2, 0),
        };
        send(socket, &[kind.to_le_bytes(), flags.to_le_bytes()].concat(), descriptors)
    }
}

/// What a zygote reports, or a session. `call` is the request's number.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    /// Warm and waiting.
    Ready { landlock: i64, image_bytes: u64 },
    /// The child exists; the descriptor of its process came along.
    Spawned { call: u32 },
    /// The child is gone, and everything that it had made.
    Exited { call: u32, wait_status: i32, max_rss_bytes: u64, cpu_microseconds: u64 },
    /// A session waits for its first turn.
    Begun,
    /// A turn has ended, and `kept` says whether its state is the session's now.
    TurnEnded { turn: u32, wait_status: i32, max_rss_bytes: u64, kept: bool },
    /// The child was not made, or could not isolate itself and ended before running the snippet.
    Fault { call: u32, text: String },
}

impl Reply {
    fn decode(bytes: &[u8]) -> io::Result<Self> {
        let (head, text) = bytes.split_first_chunk::<REPLY_HEAD_BYTES>().ok_or_else(|| bad(bytes.len()))?;
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| head[at + i]));
        let half = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| head[at + i]));
        let (kind, call, number) = (half(0), half(4), word(8).cast_signed());
        match kind {
            READY => Ok(Self::Ready { landlock: number, image_bytes: word(16) }),
            SPAWNED => Ok(Self::Spawned { call }),
            EXITED => Ok(Self::Exited {
                call,
                wait_status: i32::try_from(number).map_err(|_| bad(bytes.len()))?,
                max_rss_bytes: word(16),
                cpu_microseconds: word(24),
            }),
            BEGUN => Ok(Self::Begun),
            TURN_ENDED => Ok(Self::TurnEnded {
                turn: call,
                wait_status: i32::try_from(number).map_err(|_| bad(bytes.len()))?,
                max_rss_bytes: word(16),
                kept: word(24) != 0,
            }),
            FAULT => Ok(Self::Fault { call, text: String::from_utf8_lossy(text).into_owned() }),
            _ => Err(bad(bytes.len())),
        }
    }

    /// Waits for the next reply; `None` when the zygote has closed the socket.
    pub(crate) fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<(Self, Option<OwnedFd>)>> {
        let mut bytes = [0; REPLY_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::io::retry_on_intr(|| {
            rustix::net::recvmsg(
                socket,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            )
        })?;
        let descriptor = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
            _ => None,
        });
        if received.bytes == 0 {
            return Ok(None);
        }
        Ok(Some((Self::decode(&bytes[..received.bytes.min(REPLY_BYTES)])?, descriptor)))
    }
}

fn bad(length: usize) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("a message of {length} bytes from the zygote makes no sense"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_decode_or_are_refused_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = Reply::decode(&bytes);
        }

        #[test]
        fn an_exit_is_read_as_it_was_packed(call: u32, status: i32, rss: u64, cpu: u64) {
            let mut bytes = Vec::new();
            bytes.extend(EXITED.to_le_bytes());
            bytes.extend(call.to_le_bytes());
            bytes.extend(i64::from(status).to_le_bytes());
            bytes.extend(rss.to_le_bytes());
            bytes.extend(cpu.to_le_bytes());
            let reply = Reply::Exited { call, wait_status: status, max_rss_bytes: rss, cpu_microseconds: cpu };
            prop_assert_eq!(Reply::decode(&bytes).expect("valid"), reply);
        }
    }

    #[test]
    fn a_request_has_the_layout_that_the_zygote_unpacks() {
        // struct.pack("<IIQQQQQII", 1, 2, 3, 4, 5, 6, 7, 8, 9)
        let request = Request {
            call: 1,
            tasks: 2,
            seed: 3,
            memory_bytes: 4,
            cpu_seconds: 5,
            tmp_bytes: 6,
            file_bytes: 7,
            open_files: 8,
            flags: 9,
        };
        let bytes = request.encode();
        let nonzero: Vec<_> =
            bytes.iter().enumerate().filter(|(_, b)| **b != 0).map(|(i, b)| (i, *b)).collect();
        assert_eq!(nonzero, [(0, 1), (4, 2), (8, 3), (16, 4), (24, 5), (32, 6), (40, 7), (48, 8), (52, 9)]);
    }
}
