//! What became of a snippet: the value every caller gets, and its JSON.
//!
//! A snippet that fails, runs too long or is killed is an [`Outcome`]; only a fault of the sandbox itself is an
//! error. Nothing in an outcome may come from outside the snippet: no path, no variable, no frame of the host.

use serde::{Deserialize, Serialize};

/// How a snippet ended. In JSON: `ok`, `error`, `timeout`, `memory`, `killed`, `output_limit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It ended by itself with exit code 0.
    Ok,
    /// It ended by itself with another exit code, by an uncaught exception or by a crash.
    Error,
    /// The wall-clock or CPU limit ended it.
    Timeout,
    /// The memory limit of its process tree ended it.
    Memory,
    /// SIGKILL for another reason: the node's own out-of-memory killer, an operator; or, in a session without namespaces, too
    /// many tasks.
    Killed,
    /// It wrote more than the output limit and was ended.
    OutputLimit,
}

/// The end of one snippet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// How it ended.
    pub status: Status,
    /// The head of its standard output; bytes that are not UTF-8 are replaced.
    pub stdout: String,
    /// The head of its standard error. After an uncaught exception it ends with the snippet's own traceback.
    pub stderr: String,
    /// Its exit code; minus the signal's number if a signal ended it (as Python's `subprocess` counts); `None` if the
    /// sandbox ended it.
    pub exit_code: Option<i32>,
    /// Wall-clock time from the request to the end, without the wait for a slot.
    pub seconds: f64,
    /// Most memory seen beyond the warm image, in bytes: the larger of the tree's anonymous and shared memory as sampled
    /// and the kernel's highest count for its largest process, which includes the pages it touched of programs, libraries
    /// and other mapped files. So it is never less than what one process held, however short it was.
    pub peak_bytes: u64,
    /// More was written than `stdout` and `stderr` hold.
    pub output_truncated: bool,
}

impl Outcome {
    /// What an uncaught exception's traceback ends with, `TypeName: message`; a default where nothing was written.
    #[must_use]
    pub fn last_line_of_stderr(&self) -> &str {
        self.stderr.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("exited with an error")
    }
}

/// Captured bytes as text. A character cut in two by the limit is left out, any other bad byte becomes U+FFFD.
pub(crate) fn text_of(mut bytes: Vec<u8>, truncated: bool) -> String {
    if truncated
        && let Err(error) = std::str::from_utf8(&bytes)
        && error.error_len().is_none()
    {
        bytes.truncate(error.valid_up_to());
    }
    match String::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_names_the_status_in_snake_case() {
        let outcome = Outcome {
            status: Status::OutputLimit,
            stdout: "x\n".into(),
            stderr: String::new(),
            exit_code: None,
            seconds: 0.5,
            peak_bytes: 7,
            output_truncated: true,
        };
        let text = serde_json::to_string(&outcome).expect("serialises");
        assert_eq!(
            text,
            r#"{"status":"output_limit","stdout":"x\n","stderr":"","exit_code":null,"seconds":0.5,"peak_bytes":7,"output_truncated":true}"#
        );
        assert_eq!(serde_json::from_str::<Outcome>(&text).expect("reads back"), outcome);
    }

    #[test]
    fn a_character_cut_by_the_limit_is_dropped_and_bad_bytes_are_replaced() {
        let euro = "a€".as_bytes();
        assert_eq!(text_of(euro[..3].to_vec(), true), "a");
        assert_eq!(text_of(euro[..3].to_vec(), false), "a\u{fffd}");
        assert_eq!(text_of(b"a\xffb".to_vec(), true), "a\u{fffd}b");
    }
}
