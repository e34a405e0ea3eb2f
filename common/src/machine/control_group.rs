//! How much memory the kernel grants this process: the limits of its control group and of every group around it.
//!
//! Called by [`super::memory`]. Both versions of control groups, and both beside each other. What must stay true: the
//! smallest limit of all groups counts, and files that the kernel has cached count as free, since it gives them up.

use std::path::Path;

use super::Memory;

/// The files of a version.
struct Version {
    limit: &'static str,
    used: &'static str,
    /// Keys of `memory.stat`: cached files, of the group and those below it.
    cached: [&'static str; 2],
}

const V1: Version = Version {
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    cached: ["total_inactive_file", "total_active_file"],
};
const V2: Version =
    Version { limit: "memory.max", used: "memory.current", cached: ["inactive_file", "active_file"] };

/// What the groups of `/proc/self/cgroup`'s text leave, below the folder they are mounted on; `None`: no limit.
pub(super) fn limits(own: &str, mounted: &Path) -> Option<Memory> {
    let of_line = |line: &str| {
        let mut fields = line.splitn(3, ':');
        let (id, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        match (id, controllers) {
            ("0", "") => walk(&V2, mounted, path),
            (_, list) if list.split(',').any(|name| name == "memory") => {
                walk(&V1, &mounted.join("memory"), path)
            }
            _ => None,
        }
    };
    own.lines().filter_map(of_line).reduce(tighter)
}

/// From the group at `path` up to the root. In a container the path may be the host's, of which only the root is there.
fn walk(version: &Version, root: &Path, path: &str) -> Option<Memory> {
    let own = root.join(path.trim_start_matches('/'));
    let groups = own.ancestors().take_while(|group| group.starts_with(root));
    groups.filter_map(|group| read(version, group)).reduce(tighter)
}

fn read(version: &Version, group: &Path) -> Option<Memory> {
    let text = |file: &str| std::fs::read_to_string(group.join(file)).ok();
    // `max` is no number: no limit.
    let limit: u64 = text(version.limit)?.trim().parse().ok()?;
    let used: u64 = text(version.used).and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    let stat = text("memory.stat").unwrap_or_default();
    let cached = stat.lines().filter_map(|line| {
        let (key, bytes) = line.split_once(' ')?;
        version.cached.contains(&key).then(|| bytes.trim().parse::<u64>().ok())?
    });
    let taken = used.saturating_sub(cached.sum());
    Some(Memory { total_bytes: limit, available_bytes: limit.saturating_sub(taken) })
}

fn tighter(a: Memory, b: Memory) -> Memory {
    Memory {
        total_bytes: a.total_bytes.min(b.total_bytes),
        available_bytes: a.available_bytes.min(b.available_bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A group's files: limit, used, inactive and active file pages in MiB.
    fn group(version: &Version, folder: &Path, limit: Option<u64>, [used, inactive, active]: [u64; 3]) {
        std::fs::create_dir_all(folder).unwrap();
        let limit = limit.map_or("max".to_owned(), |mib| (mib * MIB).to_string());
        // As the kernel writes them: the first version has the group's own beside its whole tree's.
        let (inactive, active) = (inactive * MIB, active * MIB);
        let stat = match version.limit {
            "memory.max" => format!("anon 5\ninactive_file {inactive}\nactive_file {active}\n"),
            _ => format!(
                "cache 5\ninactive_file 1\nactive_file 2\ntotal_inactive_file {inactive}\n\
                 total_active_file {active}\n"
            ),
        };
        std::fs::write(folder.join(version.limit), format!("{limit}\n")).unwrap();
        std::fs::write(folder.join(version.used), format!("{}\n", used * MIB)).unwrap();
        std::fs::write(folder.join("memory.stat"), stat).unwrap();
    }

    fn mib(total: u64, available: u64) -> Option<Memory> {
        Some(Memory { total_bytes: total * MIB, available_bytes: available * MIB })
    }

    #[test]
    fn the_smallest_limit_between_the_own_group_and_the_root_counts() {
        let mounted = tempfile::tempdir().unwrap();
        let of = |path: &str| mounted.path().join(path);
        group(&V2, &of(""), None, [9000, 0, 0]);
        group(&V2, &of("pod"), Some(1000), [700, 200, 100]);
        group(&V2, &of("pod/job"), Some(4000), [300, 0, 0]);
        group(&V2, &of("other"), Some(10), [10, 0, 0]);
        let limits = |own| limits(own, mounted.path());
        assert_eq!(limits("0::/pod/job\n"), mib(1000, 600), "cached files are free");
        assert_eq!(limits("0::/pod\n"), mib(1000, 600));
        assert_eq!(limits("0::/\n"), None);
        assert_eq!(limits("0::/pod/job/of/the/host\n"), mib(1000, 600), "what is not there limits nothing");
        assert_eq!(limits(""), None);
        assert_eq!(limits("nonsense"), None);
    }

    #[test]
    fn the_first_version_nests_too_and_both_may_be_there() {
        let mounted = tempfile::tempdir().unwrap();
        let of = |path: &str| mounted.path().join(path);
        group(&V1, &of("memory"), Some(9_000_000), [0, 0, 0]);
        group(&V1, &of("memory/pod"), Some(2000), [1500, 400, 100]);
        let own = "4:cpu,cpuacct:/pod\n3:memory:/pod\n0::/pod\n";
        assert_eq!(limits(own, mounted.path()), mib(2000, 1000));
        group(&V2, &of("pod"), Some(1800), [1700, 0, 0]);
        assert_eq!(limits(own, mounted.path()), mib(1800, 100));
    }
}
