//! Every call shows the head's token: `authorization: Bearer …`.
//!
//! The token is compared in constant time and never logged. The network is plain text: off the loopback the
//! token is only as secret as the network.

use std::sync::Arc;

use agentfly_common::telemetry::names;
use sha2::{Digest, Sha256};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Status};

/// Refuses calls without the token.
#[derive(Clone)]
pub struct Bearer {
    expected: Arc<[u8; 32]>,
}

impl Bearer {
    /// Expects `token`.
    #[must_use]
    pub fn new(token: &str) -> Self {
        Self { expected: Arc::new(digest(token.as_bytes())) }
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let shown = request.metadata().get("authorization").map(MetadataValue::as_bytes);
        let token = shown.and_then(|value| value.strip_prefix(b"Bearer "));
        if token.is_some_and(|token| equal(&digest(token), &self.expected)) {
            return Ok(request);
        }
        metrics::counter!(names::CALLS_REFUSED).increment(1);
        Err(Status::unauthenticated(match token {
            None => {
                "this head wants its token; set AGENTFLY_TOKEN, or run the command as the user who started it"
            }
            Some(_) => {
                "this is not the token of this head; was it started anew? take the token from its head.json"
            }
        }))
    }
}

fn digest(token: &[u8]) -> [u8; 32] {
    Sha256::digest(token).into()
}

/// Compares digests, so neither the token's length nor its bytes show in the time it takes.
fn equal(a: &[u8; 32], b: &[u8; 32]) -> bool {
    a.iter().zip(b).fold(0, |differences, (a, b)| std::hint::black_box(differences | (a ^ b))) == 0
}

/// Shows the token with every call: the client's side.
#[derive(Clone)]
pub struct ShowToken(MetadataValue<Ascii>);

impl ShowToken {
    /// Shows `token`.
    ///
    /// # Errors
    /// When it holds characters that no header may hold.
    pub fn new(token: &str) -> Result<Self, tonic::metadata::errors::InvalidMetadataValue> {
        let mut value: MetadataValue<Ascii> = format!("Bearer {token}").parse()?;
        value.set_sensitive(true);
        Ok(Self(value))
    }
}

impl Interceptor for ShowToken {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", self.0.clone());
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_token_opens() {
        let mut bearer = Bearer::new("secret");
        let shown = |token: &str| ShowToken::new(token).unwrap().call(Request::new(())).unwrap();
        assert!(bearer.call(shown("secret")).is_ok());
        for wrong in ["", "secre", "secrets", "Secret"] {
            let refused = bearer.call(shown(wrong)).unwrap_err();
            assert_eq!(refused.code(), tonic::Code::Unauthenticated, "{wrong}");
        }
        let mut basic = Request::new(());
        basic.metadata_mut().insert("authorization", "Basic secret".parse().unwrap());
        assert!(bearer.call(basic).is_err());
        let none = bearer.call(Request::new(())).unwrap_err();
        assert!(none.message().contains("AGENTFLY_TOKEN") && !none.message().contains("secret"));
    }
}
