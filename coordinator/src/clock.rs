//! The wall clock, for what people read: seconds since 1970. Decisions use the scheduler's own time.

/// Now.
#[must_use]
pub fn unix_seconds() -> f64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0.0, |elapsed| elapsed.as_secs_f64())
}
