//! A text that must not be printed: the token between coordinator and workers.
//!
//! Held by what is logged or may be one day. What must stay true: nothing but [`Secret::expose`] gives the text.

use std::fmt;

/// A text whose `Debug` does not show it, and which has no `Display`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Hides `text`.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text, for the one who must show it to the other side.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_holds_a_secret_prints_without_it() {
        let held = Some(Secret::new("hunter2"));
        assert_eq!(format!("{held:?}"), "Some(Secret(…))");
        assert!(!format!("{held:#?}").contains("hunter2"));
        assert_eq!(held.map(|secret| secret.expose().to_owned()).as_deref(), Some("hunter2"));
    }
}
