//! A job before it is queued: its settings checked on this machine, its questions read, its folder opened.
//!
//! Blocks (files): the API runs it beside the scheduler. `coordinator train` does it first, so that what is wrong is
//! said before a head or a worker is started. What must stay true: a model's weights are fetched after everything that
//! its configuration tells was found right, the memory of CPUs included (what a GPU holds is known to its rank alone).

use std::path::{Path, PathBuf};

use agentfly_common::config::{
    BatchPlan, Config, REWARDS, ResumeMode, batch_plan, preflight, reward_reference,
};
use agentfly_common::ids::Purpose;
use agentfly_common::model_dir::ModelConfig;
use agentfly_common::row::QUESTION_FIELDS;
use agentfly_hub::hub_name;
use anyhow::anyhow;

use crate::core::JobPlan;
use crate::core::event::{CoreFault, JobSpec};
use crate::data::{Cursor, Dataset, Limits, Need, Order, Row};
use crate::failure::{Failure, Outcome};
use crate::journal::NewJob;
use crate::model_check::{check_model, fetch_model, model_shape};
use crate::store::run_dir::{Opened, RunDir, RunDirError};
use crate::store::{checkpoints, free_bytes};

/// What a checkpoint needs beyond its weights: tokenizer, manifest, and room to breathe.
const SPARE_BYTES: u64 = 64 << 20;

/// A job that may be queued.
pub struct Submission {
    /// For the core.
    pub spec: JobSpec,
    /// For the journal.
    pub new_job: NewJob,
    /// Its data.
    pub questions: Questions,
    /// Its folder, locked.
    pub run_dir: RunDir,
    /// What was decided on the way, for the job's log.
    pub notes: Vec<String>,
}

/// The rows of a job, as they go to the ranks.
#[derive(Debug)]
pub struct Questions {
    train: Vec<Row>,
    validation: Vec<Row>,
}

impl Questions {
    /// Reads and checks the data sets of a job.
    ///
    /// # Errors
    /// File, row and field of what is wrong.
    pub fn load(config: &Config) -> Outcome<Self> {
        let failed = |error: crate::data::DataError| Failure { whose: error.whose(), error: error.into() };
        let (data, reward) = (&config.data, config.agent.reward_name.as_str());
        let Some(reference) = reward_reference(reward) else {
            let names = REWARDS.join(", ");
            return Err(Failure::operator(anyhow!("agent.reward_name={reward}: expected one of: {names}")));
        };
        let need = Need { reward, reference };
        let load = |files| Dataset::load(files, &need, Limits::default()).map_err(failed);
        let train = load(&data.train_files)?;
        let validation = load(&data.val_files)?.first(data.val_limit());
        // Without shuffling, one batch of the whole subset is the subset in file order.
        let mut subset = Order::new(train.len(), data.train_limit(), config.data_seed(), false);
        let size = subset.len();
        let taken = subset.next_batch(&mut Cursor::default(), size);
        let train = taken.into_iter().map(|row| train.rows()[row].clone()).collect();
        Ok(Self { train, validation: validation.rows().to_vec() })
    }

    /// `(id, row as JSON)` of a row.
    #[must_use]
    pub fn row(&self, purpose: Purpose, row: usize) -> Option<(String, String)> {
        let rows = match purpose {
            Purpose::Train => &self.train,
            Purpose::Validation => &self.validation,
        };
        let row = rows.get(row)?;
        // The shape of a row in a file: the text under the first of the fields that ranks look in.
        let mut fields = row.extra.clone();
        for (name, value) in
            [("id", &row.id), (QUESTION_FIELDS[0], &row.text), ("data_source", &row.data_source)]
        {
            fields.insert(name.to_owned(), value.as_str().into());
        }
        Some((row.id.clone(), serde_json::Value::from(fields).to_string()))
    }

    /// Rows of the training set.
    #[must_use]
    pub fn train_rows(&self) -> usize {
        self.train.len()
    }

    /// Rows of the validation set.
    #[must_use]
    pub fn validation_rows(&self) -> usize {
        self.validation.len()
    }
}

/// What [`examine`] found.
#[derive(Debug)]
pub struct Examined {
    /// The settings.
    pub config: Config,
    /// The model's shape.
    pub model: ModelConfig,
    /// The data.
    pub questions: Questions,
    /// The batch arithmetic.
    pub plan: BatchPlan,
}

/// Makes every path of the settings absolute; relative ones start at `working_dir`. A model's hub name stays one,
/// unless a folder of that name is there.
#[must_use]
pub fn with_absolute_paths(mut config: Config, working_dir: &Path) -> Config {
    let absolute = |path: &mut PathBuf| *path = lexically_clean(&working_dir.join(&path));
    let model = |path: &mut PathBuf| {
        if working_dir.join(&path).exists() || hub_name(path).is_none() {
            absolute(path);
        }
    };
    config.data.train_files.iter_mut().chain(&mut config.data.val_files).for_each(absolute);
    model(&mut config.actor_rollout_ref.model.path);
    config.agent.model_name_or_path.iter_mut().for_each(model);
    let (run_dir, trainer) = (config.trainer.run_dir(), &mut config.trainer);
    trainer.run_dir = Some(run_dir);
    [&mut trainer.run_dir, &mut trainer.default_local_dir, &mut trainer.resume_from_path]
        .into_iter()
        .flatten()
        .for_each(absolute);
    config
}

/// Takes `.` out of a path; `..` stays, for a link before it may lead elsewhere.
fn lexically_clean(path: &Path) -> PathBuf {
    path.components().collect()
}

/// Checks what can be checked without a model's weights: paths, every question, the batch arithmetic, the model's
/// configuration. Paths must be absolute already.
///
/// # Errors
/// What is wrong, and what to do.
pub fn examine(config: Config) -> Outcome<Examined> {
    let on_the_hub = hub_name(&config.actor_rollout_ref.model.path).is_some();
    preflight(&config, on_the_hub)?;
    let questions = Questions::load(&config)?;
    let plan = batch_plan(&config, Some(questions.train_rows() as u64)).map_err(Failure::operator)?;
    let model = model_shape(&config)?;
    Ok(Examined { config, model, questions, plan })
}

/// Checks the rest: model files, and the room for a checkpoint. A model given by its hub name is fetched, once for all
/// ranks; the settings have its folder afterwards.
///
/// # Errors
/// What is wrong, and what to do.
pub fn complete(mut config: Config) -> Outcome<Config> {
    if hub_name(&config.actor_rollout_ref.model.path).is_some() {
        fetch_model(&mut config)?;
    }
    let model = check_model(&config)?;
    check_room(&config, model.weight_bytes())?;
    Ok(config)
}

/// One checkpoint must fit: weights as exported, plus f32 master weights and both moments of AdamW: seven times a
/// bf16 model.
fn check_room(config: &Config, weights: u64) -> Outcome {
    let (dir, need_bytes) =
        (config.trainer.checkpoint_dir(), weights.saturating_mul(7).saturating_add(SPARE_BYTES));
    let free = free_bytes(&dir).map_err(Failure::operator)?;
    if free < need_bytes {
        return Err(Failure::operator(anyhow!(
            "no room for a checkpoint in {}: about {} MiB are needed, {} MiB are free; free some, or point \
             trainer.default_local_dir elsewhere",
            dir.display(),
            need_bytes >> 20,
            free >> 20
        )));
    }
    Ok(())
}

/// A job whose settings and files are in order, before anything of it is written.
pub struct Proposal {
    spec: JobSpec,
    questions: Questions,
    total_steps: u64,
}

impl Proposal {
    /// Checks a job.
    ///
    /// # Errors
    /// What is wrong, and what to do.
    pub fn check(config: Config, working_dir: &Path) -> Outcome<Self> {
        let config = with_absolute_paths(config, working_dir);
        let Examined { config, questions, .. } = examine(config)?;
        let config = complete(config)?;
        let (train_rows, validation_rows) = (questions.train_rows(), questions.validation_rows());
        let validation_sources = questions.validation.iter().map(|row| row.data_source.clone()).collect();
        let spec = JobSpec { config, train_rows, validation_rows, validation_sources, resume: None };
        let total_steps = JobPlan::of(&spec).map_err(core_failure)?.total_steps;
        Ok(Self { spec, questions, total_steps })
    }

    /// What the scheduler must agree to before [`Proposal::open`]: a job that is refused leaves no folder behind
    /// and moves none aside.
    #[must_use]
    pub fn spec(&self) -> &JobSpec {
        &self.spec
    }

    /// Opens the job's folder.
    ///
    /// # Errors
    /// When another job holds it, or the checkpoint to resume from cannot be used.
    pub fn open(self) -> Outcome<Submission> {
        let Self { spec, questions, total_steps } = self;
        let config = &spec.config;
        let holder = format!("a job of {}/{}", config.trainer.project_name, config.trainer.experiment_name);
        let opened = RunDir::open(config, total_steps, &holder).map_err(run_dir_failure)?;
        let Opened { run_dir, resume, notes } = opened;
        let new_job = NewJob {
            project: config.trainer.project_name.clone(),
            experiment: config.trainer.experiment_name.clone(),
            run_dir: run_dir.path().to_owned(),
            checkpoint_dir: config.trainer.checkpoint_dir(),
            config_json: serde_json::to_string(config).map_err(Failure::us)?,
            ranks: config.world_size(),
            step: resume.as_ref().map_or(0, |point| point.step),
            total_steps,
        };
        let spec = JobSpec { resume, ..spec };
        Ok(Submission { spec, new_job, questions, run_dir, notes })
    }
}

fn core_failure(fault: CoreFault) -> Failure {
    Failure { whose: fault.whose, error: anyhow!(fault.message) }
}

fn run_dir_failure(error: RunDirError) -> Failure {
    Failure::operator(error)
}

/// Where a job that its head left behind goes on, in words.
#[must_use]
pub fn after_the_head_died(checkpoint_dir: &Path) -> String {
    let newest = checkpoints::steps_in(checkpoint_dir).ok().and_then(|steps| steps.last().copied());
    let how = match newest {
        Some(step) => format!("it resumes from step {step} (trainer.resume_mode={})", ResumeMode::Auto),
        None => "it has no checkpoint yet and begins anew".to_owned(),
    };
    format!("the head ended while it ran; start it again: {how}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_goes_to_the_ranks_as_it_stood_in_its_file_with_its_text_where_they_look_first() {
        let extra = serde_json::json!({"unit": "cm", "answer": 3, "question": "beside the prompt"});
        let row = Row {
            id: "q7".into(),
            text: "How long?\n$x$".into(),
            extra: extra.as_object().unwrap().clone(),
            data_source: "train".into(),
        };
        let questions = Questions { train: vec![row], validation: Vec::new() };
        let (id, json) = questions.row(Purpose::Train, 0).unwrap();
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!((id.as_str(), &json["prompt"]), ("q7", &"How long?\n$x$".into()));
        assert_eq!((&json["answer"], &json["unit"], &json["id"]), (&3.into(), &"cm".into(), &"q7".into()));
        assert!(questions.row(Purpose::Validation, 0).is_none());
    }

    #[test]
    fn relative_paths_start_where_the_job_was_submitted() {
        let settings = ["data.train_files=./data/t.json".to_owned(), "trainer.project_name=p".to_owned()];
        let config = agentfly_common::config::resolve(&settings, None, []).unwrap().config;
        let config = with_absolute_paths(config, Path::new("/home/me"));
        assert_eq!(config.data.train_files, [Path::new("/home/me/data/t.json")]);
        assert_eq!(config.trainer.run_dir(), Path::new("/home/me/runs/p/default"));
        assert_eq!(config.trainer.checkpoint_dir(), Path::new("/home/me/runs/p/default/checkpoints"));
        let again = with_absolute_paths(config.clone(), Path::new("/elsewhere"));
        assert_eq!(again, config, "absolute paths stay");
    }

    #[test]
    fn a_hub_name_is_no_path_unless_a_folder_has_that_name() {
        let model = |name: &str, working_dir: &Path| {
            let settings = [format!("actor_rollout_ref.model.path={name}")];
            let config = agentfly_common::config::resolve(&settings, None, []).unwrap().config;
            with_absolute_paths(config, working_dir).actor_rollout_ref.model.path
        };
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(model("acme/tiny@v2", folder.path()), Path::new("acme/tiny@v2"));
        assert_eq!(model("./acme/tiny", folder.path()), folder.path().join("acme/tiny"));
        std::fs::create_dir_all(folder.path().join("acme/tiny")).unwrap();
        assert_eq!(model("acme/tiny", folder.path()), folder.path().join("acme/tiny"));
    }
}
