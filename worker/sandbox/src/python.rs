//! The sandbox's own Python: what the zygote and its children run before and around a snippet.

/// The program of a zygote in a jail.
pub(crate) const ZYGOTE: &str = "zygote.py";
/// The program where there is no jail: it starts the zygote, and ends what that leaves.
pub(crate) const WARDEN: &str = "warden.py";

/// File names and sources.
pub(crate) const PROGRAMS: [(&str, &str); 7] = [
    (ZYGOTE, include_str!("python/zygote.py")),
    (WARDEN, include_str!("python/warden.py")),
    ("isolation.py", include_str!("python/isolation.py")),
    ("leftovers.py", include_str!("python/leftovers.py")),
    ("place.py", include_str!("python/place.py")),
    ("script.py", include_str!("python/script.py")),
    ("session.py", include_str!("python/session.py")),
];
