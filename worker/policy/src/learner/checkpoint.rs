//! The learner's part of a checkpoint: `optimizer-00001-of-00002.safetensors` and so on, one a rank that holds a share
//! of the optimizer's state, and `learner.json` (counters). The model's own files are the model's.
//!
//! A file holds three f32 tensors of each parameter that its rank updates: `master.NAME`, `exp_avg.NAME` and
//! `exp_avg_sq.NAME`, in the parameter's shape. Where a parameter is cut between ranks, each has a flat part of it, and
//! the parts in the order of the files are the whole; so any number of ranks reads what any other has written, each
//! only its own share.
//!
//! What must stay true: learners that load what others saved continue bit for bit where there are as many, and to
//! rounding where there are not; everything is checked, on all ranks, before anything changes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use agentfly_common::ids::PolicyVersion;
use agentfly_common::model_dir::{StoredDtype, StoredTensor, stored_tensors};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::Learner;
use super::error::LearnerError;
use super::optimizer::Optimizer;
use super::shard::Piece;
use crate::model::{Decoder, write_safetensors};

const COUNTERS: &str = "learner.json";
/// The state of the first format, in one file.
const SINGLE: &str = "optimizer.safetensors";
const FORMAT: u32 = 2;
/// As many as their names have room for.
const MAX_FILES: usize = 99_999;
/// Bytes read at a time.
const CHUNK: usize = 16 << 20;
const F32: usize = size_of::<f32>();

/// `learner.json`.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Counters {
    format: u32,
    policy_version: PolicyVersion,
    training_steps: u64,
    optimizer_steps: u64,
    skips_in_a_row: u32,
    /// Files the optimizer's state is in; format 1 had one, of another name.
    #[serde(default)]
    optimizer_files: usize,
}

impl Counters {
    fn read(dir: &Path) -> Result<Self, LearnerError> {
        let path = dir.join(COUNTERS);
        let text = fs::read_to_string(&path).map_err(|e| fault(&path, e))?;
        let counters: Self = serde_json::from_str(&text).map_err(|e| fault(&path, e))?;
        match counters.format {
            1 => Ok(counters),
            FORMAT if (1..=MAX_FILES).contains(&counters.optimizer_files) => Ok(counters),
            FORMAT => {
                let files = counters.optimizer_files;
                Err(fault(&path, format!("optimizer_files is {files}, not 1 to {MAX_FILES}")))
            }
            other => Err(fault(&path, format!("format {other}, but this program reads 1 to {FORMAT}"))),
        }
    }

    fn files(&self, dir: &Path) -> Vec<PathBuf> {
        match self.format {
            1 => vec![dir.join(SINGLE)],
            _ => (0..self.optimizer_files).map(|i| dir.join(file_name(i, self.optimizer_files))).collect(),
        }
    }
}

fn file_name(index: usize, count: usize) -> String {
    format!("optimizer-{:05}-of-{count:05}.safetensors", index + 1)
}

fn fault(path: &Path, problem: impl ToString) -> LearnerError {
    LearnerError::Checkpoint { path: path.display().to_string(), problem: problem.to_string() }
}

/// The parts of the state, by the prefix of their tensors' names.
fn parts(optimizer: &Optimizer) -> [(&'static str, &Tensor); 3] {
    [("master", &optimizer.master), ("exp_avg", &optimizer.exp_avg), ("exp_avg_sq", &optimizer.exp_avg_sq)]
}

/// Where a part of a tensor lies: its numbers from `start` on are the file's from `offset` bytes on.
struct Run {
    path: PathBuf,
    offset: u64,
    start: i64,
    len: i64,
}

/// What is read into this rank's share: elements of a buffer, and the runs that fill them.
struct Filling<'a> {
    buffer: &'a Tensor,
    at: i64,
    run: Run,
}

impl Learner {
    /// Writes this rank's files into `dir`, which must exist, and names them; each file is complete or absent. All
    /// ranks save, each its share; rank 0 writes the counters too. Where every rank holds the whole state, only rank
    /// 0 writes.
    ///
    /// # Errors
    /// [`LearnerError::Broken`] where a step or a load has failed half-way: such weights are of no version. When a file
    /// cannot be written.
    pub fn save(&self, dir: &Path) -> Result<Vec<String>, LearnerError> {
        if self.broken {
            return Err(LearnerError::Broken);
        }
        let shards = &self.optimizer.shards;
        if shards.count == 1 && self.ranks.index() > 0 {
            return Ok(Vec::new());
        }
        let mut tensors = Vec::new();
        for (part, flat) in parts(&self.optimizer) {
            for piece in shards.own_pieces() {
                let values = flat.f_narrow(0, piece.start - shards.own().start, piece.len)?;
                tensors
                    .push((format!("{part}.{}", piece.slot.name), values.f_view(piece.shape().as_slice())?));
            }
        }
        let mut names = vec![file_name(shards.index, shards.count)];
        publish(&dir.join(&names[0]), |partial| Ok(write_safetensors(partial, &tensors)?))?;
        if shards.index == 0 {
            let counters = Counters {
                format: FORMAT,
                policy_version: self.version,
                training_steps: self.steps,
                optimizer_steps: self.optimizer.steps,
                skips_in_a_row: self.skips_in_a_row,
                optimizer_files: shards.count,
            };
            let path = dir.join(COUNTERS);
            let text = serde_json::to_string_pretty(&counters).map_err(|e| fault(&path, e))?;
            publish(&path, |partial| fs::write(partial, text + "\n").map_err(|e| fault(partial, e)))?;
            names.push(COUNTERS.to_owned());
        }
        Ok(names)
    }

    /// Continues from what any number of ranks wrote into `dir` by [`Learner::save`]: state, counters, version, and
    /// the weights of `decoder`. All ranks must call it at the same time. Everything is checked before anything
    /// changes; if the reading itself fails after that, the learner is broken.
    ///
    /// # Errors
    /// Names the file and what is missing, extra or of another shape. [`LearnerError::LeftGroup`] of a rank that would
    /// have to go on alone; [`LearnerError::OtherDecoder`].
    pub fn load(&mut self, dir: &Path, decoder: &mut Decoder) -> Result<(), LearnerError> {
        self.ranks.check()?;
        self.check_decoder(decoder)?;
        let checked = Counters::read(dir).and_then(|counters| {
            let found = find(&counters.files(dir), &self.optimizer)?;
            Ok((counters, found))
        });
        let mut failed = [f64::from(u8::from(checked.is_err()))];
        self.ranks.maxima(&mut failed)?;
        let (counters, found) = checked?;
        if failed[0] > 0.0 {
            return Err(LearnerError::PeerCannotRead { path: dir.display().to_string() });
        }
        self.broken = true;
        if let Err(error) = self.take_over(&found, &counters, decoder) {
            // The others wait for this rank's share: leaving the group, they fail at once.
            self.ranks.leave();
            return Err(error);
        }
        self.version = counters.policy_version;
        self.steps = counters.training_steps;
        self.skips_in_a_row = counters.skips_in_a_row;
        self.broken = false;
        Ok(())
    }

    /// Reads this rank's share into the optimizer, and everyone's into the model.
    fn take_over(
        &mut self,
        found: &Found,
        counters: &Counters,
        decoder: &Decoder,
    ) -> Result<(), LearnerError> {
        let _no_grad = tch::no_grad_guard();
        fillings(&self.optimizer, found).try_for_each(|filling| read(&filling))?;
        self.optimizer.steps = counters.optimizer_steps;
        self.optimizer.publish(decoder)?;
        self.optimizer.gather(decoder, &self.ranks)
    }
}

/// The stored parts of every tensor of the state, in the order of the files.
type Found = BTreeMap<String, Vec<StoredTensor>>;

/// Finds every tensor of the state in the files' headers: all there, nothing else, each as long as the parameter.
fn find(files: &[PathBuf], optimizer: &Optimizer) -> Result<Found, LearnerError> {
    let mut found = Found::new();
    for path in files {
        if !path.is_file() {
            return Err(fault(path, "no such file"));
        }
        for stored in stored_tensors(path).map_err(crate::model::ModelError::from)? {
            found.entry(stored.name.clone()).or_default().push(stored);
        }
    }
    let Some(first) = files.first() else { return Ok(found) };
    let slots = &optimizer.shards.slots;
    for (part, _) in parts(optimizer) {
        for slot in slots {
            let (name, shape) = (format!("{part}.{}", slot.name), &slot.shape);
            let Some(stored) = found.get(&name) else {
                return Err(fault(first, format!("tensor `{name}` {shape:?} is missing")));
            };
            if let Some(other) = stored.iter().find(|stored| stored.dtype != StoredDtype::F32) {
                return Err(fault(&other.path, format!("tensor `{name}` is {:?}, not F32", other.dtype)));
            }
            let shapes: Vec<&Vec<i64>> = stored.iter().map(|stored| &stored.shape).collect();
            let fits = match shapes.as_slice() {
                [one] => *one == shape,
                parts => parts.iter().map(|part| part.iter().product::<i64>()).sum::<i64>() == slot.len,
            };
            if !fits {
                let is = shapes.iter().map(|shape| format!("{shape:?}")).collect::<Vec<_>>().join(" and ");
                let problem = format!("tensor `{name}` is {is}, but this model's is {shape:?}");
                return Err(fault(&stored[0].path, problem));
            }
        }
    }
    let known = |name: &String| {
        name.split_once('.').is_some_and(|(part, parameter)| {
            parts(optimizer).iter().any(|(p, _)| *p == part) && slots.iter().any(|s| s.name == parameter)
        })
    };
    match found.iter().find(|(name, _)| !known(name)) {
        Some((name, stored)) => {
            let (path, shape) = (&stored[0].path, &stored[0].shape);
            Err(fault(path, format!("tensor `{name}` {shape:?} has no place in this model")))
        }
        None => Ok(found),
    }
}

/// What fills this rank's share, run by run.
fn fillings<'a>(optimizer: &'a Optimizer, found: &'a Found) -> impl Iterator<Item = Filling<'a>> {
    let own = optimizer.shards.own().start;
    parts(optimizer).into_iter().flat_map(move |(part, buffer)| {
        optimizer.shards.own_pieces().flat_map(move |piece| {
            let stored = found.get(&format!("{part}.{}", piece.slot.name)).map_or(&[][..], Vec::as_slice);
            runs(piece, stored).map(move |run| Filling { buffer, at: run.start - own, run })
        })
    })
}

/// The stored runs that make up `piece`, in the flat order.
fn runs<'a>(piece: Piece<'a>, stored: &'a [StoredTensor]) -> impl Iterator<Item = Run> + 'a {
    let mut begin = piece.slot.start;
    stored.iter().filter_map(move |part| {
        let (first, end) = (begin, begin + part.shape.iter().product::<i64>());
        begin = end;
        let (start, end) = (first.max(piece.start), end.min(piece.start + piece.len));
        let offset = part.offset + (start - first).max(0) as u64 * F32 as u64;
        (start < end).then(|| Run { path: part.path.clone(), offset, start, len: end - start })
    })
}

fn read(filling: &Filling<'_>) -> Result<(), LearnerError> {
    let Run { path, offset, len, .. } = &filling.run;
    let file = File::open(path).map_err(|e| fault(path, e))?;
    let per_chunk = (CHUNK / F32) as i64;
    let mut bytes = vec![0; (*len).min(per_chunk) as usize * F32];
    for start in (0..*len).step_by(CHUNK / F32) {
        let count = per_chunk.min(len - start);
        let bytes = &mut bytes[..count as usize * F32];
        file.read_exact_at(bytes, offset + start as u64 * F32 as u64).map_err(|e| fault(path, e))?;
        let values = Tensor::f_from_data_size(bytes, &[count], Kind::Float)?;
        filling.buffer.f_narrow(0, filling.at + start, count)?.f_copy_(&values)?;
    }
    Ok(())
}

/// Writes a file beside its place, makes it durable and gives it its name.
fn publish(path: &Path, write: impl FnOnce(&Path) -> Result<(), LearnerError>) -> Result<(), LearnerError> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let partial = tempfile::Builder::new().prefix(".learner-").suffix(".partial").tempfile_in(dir);
    let partial = partial.map_err(|e| fault(path, e))?.into_temp_path();
    write(&partial)?;
    File::open(&partial).and_then(|file| file.sync_all()).map_err(|e| fault(path, e))?;
    partial.persist(path).map_err(|e| fault(path, e))
}
