//! Memory and CPU time of a snippet's process tree, read from `/proc` of the host.
//!
//! Called by the supervisor a few times per second for each running snippet. A snippet shares most of its memory with
//! its zygote, so adding up resident sizes counts the warm image once per process and would kill innocent programs:
//! the sum is only the cheap first test, and what decides is the proportional size, which counts a page shared by N
//! processes as 1/N of a page.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use crate::files::Files;
use crate::limits::Limits;
use crate::outcome::Status;

/// More processes than any task limit allows to look at in one sample.
const MOST_PROCESSES: usize = 8192;

/// Watches one tree.
pub(crate) struct Watcher {
    root: i32,
    memory_limit_bytes: u64,
    cpu_limit: Duration,
    /// Anonymous memory of the zygote, which each process of the tree starts with.
    image_bytes: u64,
    /// Its files, where no file system of its own limits them.
    files: Option<Files>,
    /// Tasks that it may have, where the kernel's limit is for more than this tree.
    most_tasks: Option<u32>,
    /// CPU time that the tree had used before: by the earlier turns of a session.
    used_before: Duration,
    /// The own CPU time of every process seen, by number and start.
    seen: BTreeMap<(i32, u64), Duration>,
    /// Processes whose first thread had ended at the last sample, and others had not.
    headless: BTreeSet<i32>,
    /// Most memory seen, in bytes, without the pages of the warm image.
    pub(crate) peak_bytes: u64,
    /// The files were too many or too much. What follows on them would be so, too.
    pub(crate) files_over_limit: bool,
}

impl Watcher {
    /// Watches the tree below the process `root` (a host process id).
    pub(crate) fn new(root: i32, limits: &Limits, image_bytes: u64, directory: Option<PathBuf>) -> Self {
        let (memory_limit_bytes, cpu_limit) = (limits.memory_bytes, limits.cpu);
        let used_before = tree(root).into_iter().map(cpu_time).sum();
        let files = directory.map(|directory| Files::new(directory, limits.tmp_bytes));
        Self {
            root,
            memory_limit_bytes,
            cpu_limit,
            image_bytes,
            files,
            most_tasks: None,
            used_before,
            seen: BTreeMap::new(),
            headless: BTreeSet::new(),
            peak_bytes: 0,
            files_over_limit: false,
        }
    }

    /// Ends it also for more than so many processes and threads.
    pub(crate) fn with_most_tasks(mut self, tasks: u32) -> Self {
        self.most_tasks = Some(tasks);
        self
    }

    /// Takes one sample. Returns the limit that the tree is over, if it is.
    pub(crate) fn over_limit(&mut self) -> Option<Status> {
        let processes = tree(self.root);
        let resident: Vec<u64> = processes.iter().map(|process| anonymous(*process)).collect();
        let own = resident.iter().map(|bytes| bytes.saturating_sub(self.image_bytes)).sum();
        self.peak_bytes = self.peak_bytes.max(own);
        if self.some_cannot_be_counted(&processes) {
            return Some(Status::Memory);
        }
        if resident.iter().sum::<u64>() > self.memory_limit_bytes {
            let proportional = of_distinct_memories(&processes);
            if proportional > self.memory_limit_bytes {
                self.peak_bytes = self.peak_bytes.max(proportional);
                return Some(Status::Memory);
            }
        }
        let tasks = |process: &i32| fs::read_dir(format!("/proc/{process}/task")).map_or(0, Iterator::count);
        if let Some(most) = self.most_tasks
            && processes.iter().map(tasks).sum::<usize>() > most as usize
        {
            return Some(Status::Killed);
        }
        self.files_over_limit = self.files.as_mut().is_some_and(|files| files.over_limit(&processes));
        if self.files_over_limit {
            return Some(Status::Memory);
        }
        (self.cpu_time(&processes) > self.cpu_limit).then_some(Status::Timeout)
    }

    /// Whether a process lives on without its first thread, by which the kernel tells what it has. One that just ends is seen
    /// so once, but not in two samples.
    fn some_cannot_be_counted(&mut self, processes: &[i32]) -> bool {
        let ended = |process: &i32| {
            let text = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
            text.lines().any(|line| line.starts_with("State:") && line.contains('Z'))
        };
        let others =
            |process: &i32| fs::read_dir(format!("/proc/{process}/task")).map_or(0, Iterator::count) > 1;
        let now: BTreeSet<i32> = processes.iter().copied().filter(|p| ended(p) && others(p)).collect();
        let still = now.intersection(&self.headless).next().is_some();
        self.headless = now;
        still
    }

    /// CPU time since the beginning: that of the processes and of those they have reaped; or, where that is more, of every
    /// process that a sample has seen, for one whose parent ignores its end is in no other's account.
    fn cpu_time(&mut self, processes: &[i32]) -> Duration {
        let mut reaped = Duration::ZERO;
        for (process, times) in processes.iter().filter_map(|process| Some((process, times_of(*process)?))) {
            reaped += times.own + times.of_children;
            let seen = self.seen.entry((*process, times.started)).or_default();
            *seen = times.own.max(*seen);
        }
        let seen: Duration = self.seen.values().sum();
        reaped.max(seen).saturating_sub(self.used_before)
    }
}

/// Proportional size of processes, each memory once: between a vfork and the program that the child executes, parent and
/// child have the same.
fn of_distinct_memories(processes: &[i32]) -> u64 {
    let mut counted: Vec<i32> = Vec::new();
    let mut bytes = 0_u64;
    for process in processes {
        if counted.iter().any(|other| same_memory(*process, *other)) {
            continue;
        }
        counted.push(*process);
        let rollup = format!("/proc/{process}/smaps_rollup");
        // One that its user may not look into (a program that may be executed, not read) counts as if it shared nothing.
        let own = match fs::read_to_string(&rollup) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => anonymous(*process),
            _ => sum_of(&rollup, &["Pss_Anon:", "Pss_Shmem:", "SwapPss:"]),
        };
        bytes = bytes.saturating_add(own);
    }
    bytes
}

/// Whether two processes have one memory; false where the kernel does not say.
fn same_memory(one: i32, other: i32) -> bool {
    const KCMP_VM: libc::c_int = 1;
    // SAFETY: the call reads no memory of this program.
    unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_VM, 0, 0) == 0 }
}

/// Tasks of a user: the processes and threads that the kernel counts for its limit.
pub(crate) fn tasks_of(uid: u32) -> u32 {
    let Ok(processes) = fs::read_dir("/proc") else { return 0 };
    let of_user = processes.flatten().filter(|process| {
        let named = process.file_name().to_str().is_some_and(|name| name.parse::<i32>().is_ok());
        named && process.metadata().is_ok_and(|found| found.uid() == uid)
    });
    let threads = of_user.map(|process| {
        let text = fs::read_to_string(process.path().join("status")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("Threads:")?.trim().parse::<u32>().ok());
        line.unwrap_or(0)
    });
    threads.sum()
}

/// Memory of a tree beyond the image that each of its processes began with, in bytes; what they share is counted in each.
pub(crate) fn resident(root: i32, image_bytes: u64) -> u64 {
    tree(root).into_iter().map(|process| anonymous(process).saturating_sub(image_bytes)).sum()
}

fn anonymous(process: i32) -> u64 {
    sum_of(&format!("/proc/{process}/status"), &["RssAnon:", "RssShmem:", "VmSwap:"])
}

/// CPU times of a process.
#[derive(Debug, Clone, Copy)]
struct Times {
    own: Duration,
    /// Of the children that it has reaped.
    of_children: Duration,
    /// When it was started, in ticks: with its number this is a process and no later one.
    started: u64,
}

/// `None` for a process that has just ended.
fn times_of(process: i32) -> Option<Times> {
    let text = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The second field is the program's name, which may hold spaces and brackets.
    let fields: Vec<u64> =
        text.rsplit_once(')')?.1.split_whitespace().map(|field| field.parse().unwrap_or(0)).collect();
    // Field 3 is the first here; times are fields 14 to 17, the start is field 22.
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    let time = |at: usize| {
        let ticks = fields.get(at)? + fields.get(at + 1)?;
        Some(Duration::from_millis(ticks.saturating_mul(1000) / per_second))
    };
    Some(Times { own: time(11)?, of_children: time(13)?, started: *fields.get(19)? })
}

/// CPU time of a process and of the children that it has reaped; zero for a process that has just ended.
fn cpu_time(process: i32) -> Duration {
    times_of(process).map_or(Duration::ZERO, |times| times.own + times.of_children)
}

/// A process and all its descendants. Orphans are not lost: the snippet's first process inherits them, as the first of its pid
/// namespace or as a subreaper.
fn tree(root: i32) -> Vec<i32> {
    let mut found = vec![root];
    let mut next = 0;
    while let Some(process) = found.get(next).copied() {
        next += 1;
        if found.len() > MOST_PROCESSES {
            break;
        }
        let Ok(threads) = fs::read_dir(format!("/proc/{process}/task")) else {
            continue;
        };
        for thread in threads.flatten() {
            let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            found.extend(children.split_whitespace().filter_map(|id| id.parse::<i32>().ok()));
        }
    }
    found
}

/// Adds up the lines of a `/proc` file that start with one of `keys`, in bytes; 0 for a process that has just ended.
pub(crate) fn sum_of(path: &str, keys: &[&str]) -> u64 {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .filter(|line| keys.iter().any(|key| line.starts_with(key)))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
        .map(|kibibytes| kibibytes.saturating_mul(1024))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_finds_itself_and_its_memory() {
        let me = std::process::id().cast_signed();
        assert_eq!(tree(me).first(), Some(&me));
        let held = vec![7_u8; 32 << 20];
        let limits = |memory_bytes, cpu| Limits { memory_bytes, cpu, ..Limits::default() };
        let mut watcher = Watcher::new(me, &limits(16 << 20, Duration::MAX), 0, None);
        assert_eq!(watcher.over_limit(), Some(Status::Memory), "{} bytes are held", held.len());
        assert!(watcher.peak_bytes >= 32 << 20);
        let mut generous = Watcher::new(me, &limits(1 << 40, Duration::MAX), 0, None);
        assert_eq!(generous.over_limit(), None);
    }

    #[test]
    fn cpu_time_is_counted_in_real_units() {
        let me = std::process::id().cast_signed();
        let started = std::time::Instant::now();
        let before = cpu_time(me);
        while cpu_time(me) < before + Duration::from_millis(100) {
            assert!(started.elapsed() < Duration::from_secs(60), "a busy loop must use CPU time");
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let used = cpu_time(me) - before;
        assert!(
            used <= started.elapsed() * u32::try_from(cores).expect("few") + Duration::from_millis(50),
            "{used:?}"
        );
    }

    #[test]
    fn the_tasks_of_a_user_include_this_one_s_threads() {
        let me = rustix::process::geteuid().as_raw();
        let (opens, waits): (Vec<_>, Vec<_>) = (0..50).map(|_| std::sync::mpsc::channel::<()>()).unzip();
        std::thread::scope(|scope| {
            for wait in waits {
                scope.spawn(move || wait.recv());
            }
            assert!(tasks_of(me) > 50, "those of one process already");
            drop(opens);
        });
        assert_eq!(tasks_of(4_000_000_000), 0);
    }

    #[test]
    fn a_process_that_has_ended_counts_nothing() {
        assert_eq!(sum_of("/proc/0/status", &["RssAnon:"]), 0);
        assert_eq!(cpu_time(0), Duration::ZERO);
    }
}
