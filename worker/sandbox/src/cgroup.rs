//! Limits by a cgroup (version 2) in addition, where the system has delegated one: what a whole pool may have of memory and
//! tasks, by the kernel's count instead of samples.
//!
//! A snippet's own limits are kept without it (`usage`); this is for the node's other programs. It bounds what all snippets
//! of the pool, its warm interpreters and its idle sessions hold together, the page cache they cause and their `/tmp`s among it.
//!
//! Delegated is a cgroup above this program's own that holds no process itself, offers both controllers, may be written to,
//! and, if this is root, who may write to all, is marked so by systemd (`Delegate=yes` with `DelegateSubgroup=`).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::limits::SandboxConfig;

const MOUNT: &str = "/sys/fs/cgroup";
const NAME: &str = "agentfly-sandbox-";
/// For a warm interpreter beside what its snippets hold: its image, its modules in the page cache.
const ZYGOTE_BYTES: u64 = 512 << 20;
/// A snippet's `/dev/shm`.
const SHM_BYTES: u64 = 16 << 20;
/// A zygote, its warden, a process that waits for a snippet, one that is being made.
const ZYGOTE_TASKS: u64 = 4;
/// A session's first process and its head.
const SESSION_TASKS: u64 = 2;

/// A pool's cgroup. Dropping it ends what is in it and removes it.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes one for a pool with so many zygotes, where that is delegated. `None` where it is not: the other limits stand.
    pub(crate) fn for_pool(config: &SandboxConfig, zygotes: usize) -> Option<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        let delegated = delegated(Path::new(MOUNT), &own, rustix::process::geteuid().is_root())?;
        remove_stale(&delegated);
        match Self::make(&delegated, config, zygotes as u64) {
            Ok(made) => {
                tracing::info!(cgroup = %made.path.display(), "sandbox: a cgroup limits the pool in addition");
                Some(made)
            }
            Err(error) => {
                tracing::warn!(cgroup = %delegated.display(), %error, "sandbox: no cgroup in addition, though one is delegated");
                None
            }
        }
    }

    fn make(delegated: &Path, config: &SandboxConfig, zygotes: u64) -> io::Result<Self> {
        fs::write(delegated.join("cgroup.subtree_control"), "+memory +pids")?;
        let path = (0_u32..)
            .map(|n| delegated.join(format!("{NAME}{}-{n}", std::process::id())))
            .find(|path| !path.exists())
            .ok_or(io::ErrorKind::AlreadyExists)?;
        fs::create_dir(&path)?;
        let made = Self { path };
        let (slots, limits) = (config.slots as u64, &config.limits);
        let each = limits.memory_bytes.saturating_add(limits.tmp_bytes).saturating_add(SHM_BYTES);
        let memory = each
            .saturating_mul(slots)
            .saturating_add(config.idle_session_bytes)
            .saturating_add(ZYGOTE_BYTES.saturating_mul(zygotes));
        let sessions = config.idle_sessions as u64;
        let tasks = (u64::from(limits.tasks) + SESSION_TASKS) * slots
            + SESSION_TASKS * sessions
            + ZYGOTE_TASKS * zygotes;
        made.set("memory.max", memory)?;
        made.set("pids.max", tasks)?;
        if made.path.join("memory.swap.max").exists() {
            made.set("memory.swap.max", 0)?;
        }
        Ok(made)
    }

    fn set(&self, file: &str, value: u64) -> io::Result<()> {
        fs::write(self.path.join(file), value.to_string())
    }

    /// Moves a process in; what it makes from then on is in it, too.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub(crate) fn add(&self, process: i32) -> io::Result<()> {
        fs::write(self.path.join("cgroup.procs"), process.to_string())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Its processes have ended before; this is for one that did not.
        let _ = fs::write(self.path.join("cgroup.kill"), "1");
        if let Err(error) = fs::remove_dir(&self.path) {
            tracing::warn!(cgroup = %self.path.display(), %error, "sandbox: its cgroup is left");
        }
    }
}

/// The cgroup above this program's that it may divide; `own` is `/proc/self/cgroup`.
fn delegated(mount: &Path, own: &str, root: bool) -> Option<PathBuf> {
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let above = mount.join(Path::new(own).parent()?);
    let read = |file: &str| fs::read_to_string(above.join(file)).unwrap_or_default();
    let offered = read("cgroup.controllers");
    let offers = |controller: &str| offered.split_whitespace().any(|offered| offered == controller);
    // The root of the hierarchy has no such file: it is nobody's to divide but the system's.
    let has_files = above.join("cgroup.type").exists();
    let writable = ["", "cgroup.procs", "cgroup.subtree_control"]
        .iter()
        .all(|file| rustix::fs::access(above.join(file), rustix::fs::Access::WRITE_OK).is_ok());
    let fits = has_files && offers("memory") && offers("pids") && read("cgroup.procs").is_empty() && writable;
    (fits && (!root || marked(&above))).then_some(above)
}

/// Whether systemd has marked a cgroup as somebody else's to divide.
fn marked(path: &Path) -> bool {
    let mut value = [0_u8; 8];
    ["user.delegate", "trusted.delegate"].iter().any(|name| {
        rustix::fs::getxattr(path, *name, &mut value[..])
            .is_ok_and(|length| value.get(..length) == Some(b"1"))
    })
}

/// Removes the cgroups of owners that were killed: those of pools are empty then, and a cgroup with processes cannot be removed.
fn remove_stale(delegated: &Path) {
    let Ok(entries) = fs::read_dir(delegated) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let owner =
            name.to_str().and_then(|name| name.strip_prefix(NAME)?.split('-').next()?.parse::<u32>().ok());
        if owner.is_some_and(|owner| !Path::new(&format!("/proc/{owner}")).exists()) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cgroup file system as plain files: what this program reads of it, and what it writes.
    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new(files: &[(&str, &str)]) -> Self {
            let tree = tempfile::tempdir().expect("temporary directory");
            for (file, content) in files {
                let path = tree.path().join(file);
                fs::create_dir_all(path.parent().expect("below the tree")).expect("directory");
                fs::write(path, content).expect("file");
            }
            Self(tree)
        }

        fn read(&self, file: &str) -> String {
            fs::read_to_string(self.0.path().join(file)).expect("was written")
        }
    }

    const SERVICE: [(&str, &str); 5] = [
        ("service/cgroup.type", "domain\n"),
        ("service/cgroup.controllers", "cpu memory pids\n"),
        ("service/cgroup.procs", ""),
        ("service/cgroup.subtree_control", ""),
        ("service/main/cgroup.procs", "1\n"),
    ];

    fn with(file: &'static str, content: &'static str) -> Tree {
        Tree::new(&SERVICE.map(|(name, had)| (name, if name == file { content } else { had })))
    }

    #[test]
    fn only_a_cgroup_above_that_is_empty_and_offers_both_controllers_is_taken() {
        let own = "0::/service/main\n";
        let tree = Tree::new(&SERVICE);
        let root = tree.0.path();
        assert_eq!(delegated(root, own, false), Some(root.join("service")));
        assert_eq!(delegated(root, own, true), None, "root may write to all: it takes what is marked");
        assert_eq!(delegated(root, "0::/\n", false), None, "there is none above");
        assert_eq!(delegated(root, "0::/main\n", false), None, "the root is the system's");
        assert_eq!(delegated(root, "4:memory:/service/main\n", false), None, "version 1");
        let busy = with("service/cgroup.procs", "17\n");
        assert_eq!(delegated(busy.0.path(), own, false), None, "a process is in it");
        let poor = with("service/cgroup.controllers", "cpu pids\n");
        assert_eq!(delegated(poor.0.path(), own, false), None, "it offers no memory controller");
    }

    #[test]
    fn a_pool_s_limits_are_the_sum_of_what_it_may_run_and_keep() {
        let tree = Tree::new(&SERVICE);
        let config = SandboxConfig { slots: 6, idle_sessions: 10, ..SandboxConfig::new("/usr/bin/python3") };
        let made = Cgroup::make(&tree.0.path().join("service"), &config, 2).expect("made");
        let name = format!("service/{NAME}{}-0", std::process::id());
        assert_eq!(tree.read("service/cgroup.subtree_control"), "+memory +pids");
        let mebibytes: u64 = 6 * (512 + 64 + 16) + 2048 + 2 * 512;
        assert_eq!(tree.read(&format!("{name}/memory.max")), (mebibytes << 20).to_string());
        assert_eq!(tree.read(&format!("{name}/pids.max")), (6 * 34 + 10 * 2 + 2 * 4).to_string());
        made.add(17).expect("written");
        assert_eq!(tree.read(&format!("{name}/cgroup.procs")), "17");
    }

    #[test]
    fn a_dead_owner_s_cgroup_is_removed_and_a_living_one_s_is_not() {
        let tree = Tree::new(&[]);
        let of = |owner: u32| tree.0.path().join(format!("{NAME}{owner}-0"));
        let (dead, alive) = (of(4_194_305), of(std::process::id()));
        for path in [&dead, &alive] {
            fs::create_dir(path).expect("directory");
        }
        remove_stale(tree.0.path());
        assert!(!dead.exists() && alive.exists());
    }
}
