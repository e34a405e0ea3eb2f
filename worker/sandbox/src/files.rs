//! How much a snippet holds in files, where no file system of its own limits that: on a node without namespaces.
//!
//! What is counted is written to by a hostile program meanwhile, so the walk goes by descriptors, never by paths: a
//! directory that is renamed, or replaced by a symlink, leads nowhere else. What could hide files from the count ends the
//! snippet as too many files do.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

/// Entries of a directory, as the inodes of the tmpfs that a snippet has elsewhere.
const MOST_FILES: usize = 4096;
/// Directories in one another; each takes a descriptor while it is counted.
const MOST_DEPTH: u32 = 64;
/// Samples one after another in which something vanished while it was counted: by chance that does not happen.
const MOST_DISTURBED: u32 = 20;
/// The unit of `st_blocks`.
const BLOCK_BYTES: u64 = 512;

/// The directory of a snippet, and its limit.
#[derive(Debug)]
pub(crate) struct Files {
    directory: PathBuf,
    limit_bytes: u64,
    disturbed: u32,
}

/// What a walk has found so far.
#[derive(Debug, Default)]
struct Count {
    bytes: u64,
    files: usize,
    disturbed: bool,
}

/// Why a walk ends early: there is too much, or it cannot be counted.
struct TooMuch;

impl Files {
    pub(crate) fn new(directory: PathBuf, limit_bytes: u64) -> Self {
        Self { directory, limit_bytes, disturbed: 0 }
    }

    /// Whether it holds too many files or too much, with those that have no name any more but are open or mapped by one of
    /// the processes.
    pub(crate) fn over_limit(&mut self, processes: &[i32]) -> bool {
        let Some(nameless) = nameless(processes, &self.directory) else { return true };
        let mut count = Count::default();
        let opened = rustix::fs::open(&self.directory, directory_flags(), Mode::empty());
        let walked = match opened {
            Ok(top) => walk(top.as_fd(), &mut count, 0),
            Err(Errno::NOENT) => Ok(()), // it has ended
            Err(_) => Err(TooMuch),
        };
        self.disturbed = if count.disturbed { self.disturbed + 1 } else { 0 };
        walked.is_err()
            || self.disturbed > MOST_DISTURBED
            || count.bytes.saturating_add(nameless) > self.limit_bytes
    }
}

fn directory_flags() -> OFlags {
    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC
}

fn walk(directory: BorrowedFd<'_>, count: &mut Count, depth: u32) -> Result<(), TooMuch> {
    let entries = Dir::read_from(directory).map_err(|_| TooMuch)?;
    for entry in entries {
        let entry = entry.map_err(|_| TooMuch)?;
        let name: CString = entry.file_name().to_owned();
        if [c".", c".."].contains(&name.as_c_str()) {
            continue;
        }
        count.files += 1;
        if count.files > MOST_FILES || depth > MOST_DEPTH {
            return Err(TooMuch);
        }
        let Ok(found) = rustix::fs::statat(directory, &name, AtFlags::SYMLINK_NOFOLLOW) else {
            count.disturbed = true;
            continue;
        };
        let blocks = u64::try_from(found.st_blocks).unwrap_or(u64::MAX);
        count.bytes = count.bytes.saturating_add(blocks.saturating_mul(BLOCK_BYTES));
        if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
            match rustix::fs::openat(directory, &name, directory_flags(), Mode::empty()) {
                Ok(below) => walk(below.as_fd(), count, depth + 1)?,
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => count.disturbed = true,
                // Its owner has closed it to whoever counts.
                Err(_) => return Err(TooMuch),
            }
        }
    }
    Ok(())
}

/// Bytes of the files without a name that the processes have open; `None` where one is mapped that none has open, whose size
/// cannot be asked for.
fn nameless(processes: &[i32], directory: &Path) -> Option<u64> {
    let mut sizes = BTreeMap::new();
    for process in processes {
        let open = fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten().flatten();
        for found in open.filter_map(|entry| fs::metadata(entry.path()).ok()) {
            if found.is_file() && found.nlink() == 0 {
                sizes.insert((found.dev(), found.ino()), found.blocks().saturating_mul(BLOCK_BYTES));
            }
        }
    }
    let inodes: BTreeSet<u64> = sizes.keys().map(|(_, inode)| *inode).collect();
    let below = directory.to_string_lossy();
    let hidden = processes.iter().any(|process| {
        let maps = fs::read_to_string(format!("/proc/{process}/maps")).unwrap_or_default();
        maps.lines().filter(|line| line.ends_with(" (deleted)") && line.contains(&*below)).any(|line| {
            let inode = line.split_whitespace().nth(4).and_then(|inode| inode.parse::<u64>().ok());
            inode.is_none_or(|inode| !inodes.contains(&inode))
        })
    });
    (!hidden).then(|| sizes.into_values().fold(0, u64::saturating_add))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three_mebibytes(directory: &tempfile::TempDir) -> Files {
        Files::new(directory.path().to_owned(), 3 << 20)
    }

    #[test]
    fn files_count_with_and_without_a_name() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let mut files = three_mebibytes(&directory);
        let me = [std::process::id().cast_signed()];
        let below = directory.path().join("a/b");
        fs::create_dir_all(&below).expect("directory");
        fs::write(below.join("named"), vec![1; 2 << 20]).expect("written");
        assert!(!files.over_limit(&me));
        fs::write(below.join("nameless"), vec![1; 2 << 20]).expect("written");
        assert!(files.over_limit(&me));
        let held = fs::File::open(below.join("nameless")).expect("opens");
        fs::remove_file(below.join("nameless")).expect("removed");
        assert!(files.over_limit(&me), "it is open and still takes its place");
        drop(held);
        assert!(!files.over_limit(&me));
        for name in 0..MOST_FILES {
            fs::write(below.join(name.to_string()), b"").expect("written");
        }
        assert!(files.over_limit(&me), "empty files are limited, too");
    }

    #[test]
    fn a_directory_deeper_than_can_be_counted_is_too_much_and_a_symlink_is_not_followed() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let mut files = three_mebibytes(&directory);
        std::os::unix::fs::symlink("/usr", directory.path().join("away")).expect("symlink");
        assert!(!files.over_limit(&[]));
        let deep: PathBuf = std::iter::repeat_n("d", MOST_DEPTH as usize + 3).collect();
        fs::create_dir_all(directory.path().join(deep)).expect("directories");
        assert!(files.over_limit(&[]));
    }

    #[test]
    fn a_directory_that_is_gone_holds_nothing() {
        let mut files = Files::new("/nowhere/at/all".into(), 1);
        assert!(!files.over_limit(&[]));
    }
}
