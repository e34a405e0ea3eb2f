//! The head of a snippet's output, from two pipes.
//!
//! Called by the supervisor whenever a pipe is readable and once more after the end. Never holds more than the limit,
//! never blocks, and notices the first byte beyond.

use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::pipe::PipeFlags;

use crate::error::{SandboxError, system};

/// One of the two streams. The pipe is gone after its end.
#[derive(Debug)]
struct Stream {
    pipe: Option<OwnedFd>,
    bytes: Vec<u8>,
}

/// Both streams, with one limit for their sum.
#[derive(Debug)]
pub(crate) struct Capture {
    streams: [Stream; 2],
    room: usize,
    /// More was written than is held.
    pub(crate) truncated: bool,
}

impl Capture {
    /// Makes the pipes. Returns the writing ends: standard output, standard error.
    pub(crate) fn new(limit_bytes: usize) -> Result<(Self, [OwnedFd; 2]), SandboxError> {
        let (stdout, stdout_end) = pipe()?;
        let (stderr, stderr_end) = pipe()?;
        let streams = [stdout, stderr].map(|pipe| Stream { pipe: Some(pipe), bytes: Vec::new() });
        Ok((Self { streams, room: limit_bytes, truncated: false }, [stdout_end, stderr_end]))
    }

    /// What to poll: the pipes that have not ended.
    pub(crate) fn polled(&self) -> impl Iterator<Item = PollFd<'_>> {
        self.streams.iter().filter_map(|s| s.pipe.as_ref()).map(|pipe| PollFd::new(pipe, PollFlags::IN))
    }

    /// Reads what is there.
    pub(crate) fn drain(&mut self) {
        for stream in &mut self.streams {
            stream.drain(&mut self.room, &mut self.truncated);
        }
    }

    /// Standard output and standard error.
    pub(crate) fn into_bytes(self) -> [Vec<u8>; 2] {
        self.streams.map(|stream| stream.bytes)
    }
}

impl Stream {
    fn drain(&mut self, room: &mut usize, truncated: &mut bool) {
        let mut buffer = [0_u8; 16 << 10];
        while let Some(pipe) = &self.pipe {
            if *truncated {
                return;
            }
            match rustix::io::read(pipe, &mut buffer) {
                Ok(0) => self.pipe = None,
                Ok(count) => {
                    let kept = count.min(*room);
                    self.bytes.extend_from_slice(&buffer[..kept]);
                    *room -= kept;
                    *truncated = kept < count;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => self.pipe = None,
            }
        }
    }
}

/// A pipe whose reading end does not block. Its writing end does, as programs expect.
fn pipe() -> Result<(OwnedFd, OwnedFd), SandboxError> {
    let (reading, writing) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(system("output pipe"))?;
    rustix::fs::fcntl_setfl(&reading, OFlags::NONBLOCK).map_err(system("output pipe"))?;
    Ok((reading, writing))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_head_is_kept_and_the_first_byte_beyond_is_noticed() {
        let (mut capture, [stdout, stderr]) = Capture::new(6).expect("pipes");
        rustix::io::write(&stdout, b"abcd").expect("writes");
        capture.drain();
        rustix::io::write(&stderr, b"ef").expect("writes");
        capture.drain();
        assert!(!capture.truncated, "exactly the limit is not too much");
        rustix::io::write(&stderr, b"g").expect("writes");
        capture.drain();
        assert!(capture.truncated);
        assert_eq!(capture.into_bytes(), [b"abcd".to_vec(), b"ef".to_vec()]);
    }

    #[test]
    fn an_ended_pipe_is_not_polled_again() {
        let (mut capture, [stdout, stderr]) = Capture::new(6).expect("pipes");
        drop(stdout);
        capture.drain();
        assert_eq!(capture.polled().count(), 1);
        drop(stderr);
        capture.drain();
        assert_eq!(capture.polled().count(), 0);
    }
}
