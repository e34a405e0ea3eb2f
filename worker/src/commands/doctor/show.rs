//! The report for people.

use agentfly_common::planner::{bytes_in_words, rows};
use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, ContentArrangement, Table, TableComponent};

use super::facts::Facts;
use super::{JobReport, Report};

/// Columns where the terminal says none.
const WIDTH: u16 = 100;

pub(super) fn print(report: &Report) {
    println!("{}", machine(&report.machine));
    match &report.job {
        Some(job) => println!("\n{}", plan(job)),
        None if report.problems.is_empty() => {
            println!("\nGive a model to see whether a job fits: worker doctor --model DIR key=value …");
        }
        None => {}
    }
}

fn table() -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    table.remove_style(TableComponent::HorizontalLines).remove_style(TableComponent::MiddleIntersections);
    if table.width().is_none() {
        table.set_width(WIDTH);
    }
    table
}

fn machine(facts: &Facts) -> Table {
    let mut rows = table();
    let yes_no = |yes: bool| if yes { "yes" } else { "no" };
    let cpu = facts.cpu.as_deref().unwrap_or("unknown");
    rows.add_row(["CPU", &format!("{} cores, {cpu}", facts.cores)]);
    let bf16 = match (facts.cpu_bf16, facts.cpu_amx) {
        (_, true) => "yes (AMX)",
        (true, false) => "yes (avx512_bf16)",
        (false, false) => "no: float32 unless bfloat16 is asked for",
    };
    rows.add_row(["bfloat16 in hardware", bf16]);
    let invariant: Vec<String> = facts.batch_invariant.iter().map(ToString::to_string).collect();
    let invariant = if invariant.is_empty() { yes_no(false).to_owned() } else { invariant.join(", ") };
    rows.add_row(["same bits in any batch", &invariant]);
    let (all, free) = (bytes_in_words(facts.memory_bytes), bytes_in_words(facts.memory_available_bytes));
    rows.add_row(["memory", &format!("{all}, {free} free now")]);
    rows.add_row(["GPUs", &gpus(facts)]);
    let build = if facts.built_for_cuda { "CUDA" } else { "CPU" };
    rows.add_row(["libtorch", &format!("{}, {build}", facts.libtorch)]);
    let sandbox = match (facts.sandbox.as_slice(), &facts.sandbox_problem) {
        ([], why) => format!("{}: {}", yes_no(false), why.as_deref().unwrap_or("unknown")),
        ([tier], _) => format!("yes, tier {tier}"),
        ([tier, weaker @ ..], _) => {
            let weaker: Vec<_> = weaker.iter().map(ToString::to_string).collect();
            format!("yes, tier {tier} (and {})", weaker.join(", "))
        }
    };
    rows.add_row(["sandbox for code", &sandbox]);
    rows
}

fn gpus(facts: &Facts) -> String {
    if facts.gpus.is_empty() {
        return "none".to_owned();
    }
    let words = facts.gpus.iter().map(|gpu| {
        let name = gpu.name.as_deref().unwrap_or("of unknown kind (no nvidia-smi)");
        let memory = |bytes: Option<u64>, what: &str| {
            bytes.map(|bytes| format!(", {}{what}", bytes_in_words(bytes))).unwrap_or_default()
        };
        format!(
            "{}: {name}{}{}",
            gpu.index,
            memory(gpu.memory_bytes, ""),
            memory(gpu.free_bytes, " free now")
        )
    });
    let mut lines: Vec<String> = words.collect();
    if facts.idle_gpus() {
        lines.push(
            "not used: this program is built with a CPU libtorch (README.md, \"GPUs\", says how to build one)".to_owned(),
        );
    }
    lines.join("\n")
}

fn plan(job: &JobReport) -> String {
    let mut all = table();
    all.set_header(["part of a rank", "bytes", "what"]);
    for (name, bytes, what) in rows(&job.plan).into_iter().filter(|(_, bytes, _)| *bytes > 0) {
        all.add_row([name.to_owned(), bytes_in_words(bytes), what]);
    }
    let rank = &job.plan.rank;
    let largest = match job.plan.longest_chain_bytes {
        Some(_) => "while training on a chain that fills its window",
        None if rank.rollout() >= rank.training() => "while chains run",
        None => "while training",
    };
    all.add_row(["peak".to_owned(), bytes_in_words(job.plan.peak_bytes()), largest.to_owned()]);
    if let Some(bytes) = all.column_mut(1) {
        bytes.set_cell_alignment(CellAlignment::Right);
    }
    let mut text = format!(
        "{}: {}, {} parameters, {} on {}\n{all}",
        job.model.display(),
        job.architecture,
        in_millions(job.parameters),
        job.plan.precision,
        job.device
    );
    for line in job.plan.in_words() {
        text.push_str("\n  ");
        text.push_str(&line);
    }
    if let Some(words) = &job.lacks_now {
        text.push_str("\n  now: ");
        text.push_str(words);
    }
    text
}

/// `135 M`, `3.1 B`.
fn in_millions(count: u64) -> String {
    match count {
        0..1_000_000 => format!("{} k", count / 1000),
        1_000_000..1_000_000_000 => format!("{} M", count / 1_000_000),
        _ => format!("{}.{} B", count / 1_000_000_000, count % 1_000_000_000 / 100_000_000),
    }
}
