//! Plans of real shapes: figures worked out by hand, order, and refusals with their numbers.

use std::path::Path;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::config::{Config, MicroBatch};
use crate::model_dir::ModelConfig;

const GIB: u64 = 1 << 30;

fn shape(
    hidden: i64,
    layers: i64,
    heads: (i64, i64),
    intermediate: i64,
    vocab: i64,
    tied: bool,
) -> ModelConfig {
    let json = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads.0, "num_key_value_heads": heads.1, "intermediate_size": intermediate,
        "vocab_size": vocab, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "max_position_embeddings": 8192, "tie_word_embeddings": tied,
    });
    ModelConfig::from_json(json.as_object().unwrap(), Path::new("config.json")).unwrap()
}

/// SmolLM2-135M's shape.
fn small() -> ModelConfig {
    shape(576, 30, (9, 3), 1536, 49_152, true)
}

/// Llama-3.1-8B's shape.
fn large() -> ModelConfig {
    shape(4096, 32, (32, 8), 14_336, 128_256, false)
}

fn work(model: &ModelConfig) -> Workload<'_> {
    Workload {
        model,
        precision: Precision::Bf16,
        optimizer_shards: 1,
        reference: false,
        window: Some(1024),
        chains: 64,
        micro_batch: MicroBatch::Planned,
        may_recompute: true,
        sandbox: SandboxRoom { slots: None, limit_bytes: GIB, idle_bytes: 0 },
    }
}

fn cpu(gib: u64, ranks: u32) -> Machine {
    Machine { kind: DeviceKind::Cpu, memory_bytes: Some(gib * GIB), ranks, threads: (2 / ranks).max(1) }
}

#[test]
fn the_parts_are_those_of_the_table() {
    let model = small();
    let all = parameters(&model);
    assert_eq!(all, 134_515_008, "as transformers counts them");
    let plan = plan(&Workload { reference: true, ..work(&model) }, &cpu(24, 2)).unwrap();
    let rank = plan.rank;
    assert_eq!(
        (rank.weights, rank.reference),
        (4 * all, 4 * all),
        "bfloat16 twice: the head is the embedding"
    );
    assert_eq!((rank.gradients, rank.optimizer), (4 * all, 12 * all));
    // 2 numbers · 2 bytes · 30 layers · 3 heads · 64 channels.
    assert_eq!(rank.kv_cache, plan.cache_tokens * 23_040);
    assert_eq!(plan.cache_tokens, 64 * 1024, "every chain may fill its window");
    assert_eq!((plan.micro_batch, plan.micro_batch_tokens), (MicroBatch::Tokens(2048), 2048));
    // h = q = 576, kv = 192, m = 1536.
    let layer = 2 * 576 + 2 * 576 + 2 * 192 + 2 * 1536;
    assert_eq!(layer_numbers(&model), layer);
    // What a layer keeps 30 times, and once more with what the way back makes again.
    // What attention sees of beginnings that rows share: three times as many tokens more.
    let activations = 2048 * 2 * (31 * layer + 2 * 576 + 1536 + 3 * 576 + 3 * 4 * (576 + 192));
    assert_eq!(rank.activations, activations + activations / 4, "with the holes between them");
    assert_eq!(rank.head, 640 * 49_152 * 6, "ten times 64 tokens make less than 32 Mi logits");
    assert_eq!(rank.total_bytes, rank.resident() + rank.rollout().max(rank.training()));
    assert_eq!(plan.recompute_above_tokens, None);
    let sandbox = plan.sandbox;
    assert_eq!((sandbox.slots, sandbox.kept_free, sandbox.at_most >> 20), (2, 192 << 20, 2 * 1024 + 128));
}

#[test]
fn an_f32_model_is_its_own_master_and_a_gpu_packs_nothing() {
    let model = small();
    let all = parameters(&model);
    let f32_work = Workload { precision: Precision::F32, reference: true, ..work(&model) };
    let rank = plan(&f32_work, &cpu(24, 1)).unwrap().rank;
    assert_eq!((rank.weights, rank.gradients, rank.optimizer), (8 * all, 4 * all, 8 * all));
    let gpu = Machine { kind: DeviceKind::Cuda, memory_bytes: Some(80 * GIB), ranks: 1, threads: 8 };
    let plan = plan(&Workload { reference: true, ..work(&model) }, &gpu).unwrap();
    assert_eq!((plan.rank.weights, plan.rank.reference), (2 * all, 2 * all));
    assert!(rows(&plan)[0].2 == "bfloat16", "{:?}", rows(&plan)[0]);
}

#[test]
fn a_gpu_has_a_page_for_padding_and_gathers_a_layers_part_of_the_cache() {
    let model = small();
    let gpu = |gib| Machine { kind: DeviceKind::Cuda, memory_bytes: Some(gib * GIB), ranks: 1, threads: 8 };
    // 2 numbers · 2 bytes · 3 heads · 64 channels, of 30 layers.
    let (layer, all) = (768, 23_040);
    for gib in [5, 6, 80] {
        let there = plan(&work(&model), &gpu(gib)).unwrap();
        let rank = there.rank;
        // Kept while training, and what is not: normed rows and the product of gate and up.
        let prefill = (4 * 576 + 2 * 576 + 2 * 192 + 3 * 1536) * 2 * PREFILL_TOKENS;
        let logits = u64::from(there.slots) * 49_152;
        let sampling = logits * 4 + logits.min(4 << 20) * 56;
        let read = (u64::from(there.slots) * u64::from(there.window)).min(2 * there.cache_tokens);
        let gathered = read * layer * 5 / 2;
        assert_eq!(rank.kv_cache, there.cache_tokens * all);
        assert_eq!(rank.rollout_workspace, prefill + sampling + PAGE_TOKENS * all + gathered, "{gib} GiB");
        assert_eq!(rank.head, 640 * 49_152 * (4 * 7 + 2), "of libtorch's operators");
        assert!(there.peak_bytes() <= there.budget_bytes.unwrap(), "{gib} GiB: {there:?}");
    }
}

/// A job's settings, with the small model on two ranks.
fn settings(more: &[&str]) -> Config {
    let mut all = vec!["trainer.n_gpus_per_node=2", "data.train_files=x.json"];
    all.extend(more);
    let all: Vec<String> = all.into_iter().map(str::to_owned).collect();
    crate::config::resolve(&all, None, []).unwrap().config
}

#[test]
fn a_jobs_settings_say_who_holds_what() {
    let model = small();
    let of = |more: &[&str]| Workload::of(&settings(more), &model, Precision::Bf16);
    assert_eq!(of(&[]).optimizer_shards, 2, "ranks share by default");
    assert_eq!(of(&["trainer.nnodes=2"]).optimizer_shards, 4);
    assert_eq!(of(&["actor_rollout_ref.actor.fsdp_config.fsdp_size=1"]).optimizer_shards, 1);
    assert_eq!(of(&["trainer.n_gpus_per_node=1"]).optimizer_shards, 1);
    let few = ["data.train_batch_size=4", "agent.num_chains=4", "data.val_files=[]"];
    assert_eq!(of(&few).chains, 8, "half of a step's");
    assert_eq!(of(&[few[0], few[1], "data.val_files=v.json"]).chains, 64, "a validation has more");
    assert!(of(&[]).may_recompute);
    assert!(!of(&["actor_rollout_ref.model.enable_gradient_checkpointing=False"]).may_recompute);
    let sandbox = of(&["sandbox.slots=3", "sandbox.memory_mb=256"]).sandbox;
    assert_eq!(sandbox, SandboxRoom { slots: Some(3), limit_bytes: 256 << 20, idle_bytes: 0 });
    let idle = |given: &[&str]| of(given).sandbox.idle_bytes;
    assert_eq!(idle(&["sandbox.idle_sessions_mb=7"]), 0, "each call begins afresh");
    assert_eq!(idle(&["sandbox.idle_sessions_mb=7", "sandbox.stateful=True"]), 7 << 20);
}

#[test]
fn the_sandbox_has_its_share_of_the_node_and_its_limit_is_held_against_it() {
    let model = small();
    let with = |slots, idle_bytes| {
        let sandbox = SandboxRoom { slots: Some(slots), limit_bytes: GIB, idle_bytes };
        plan(&Workload { sandbox, ..work(&model) }, &cpu(24, 2)).unwrap()
    };
    let (few, many) = (with(1, 0), with(33, 0));
    assert_eq!(few.budget_bytes.unwrap() - many.budget_bytes.unwrap(), GIB, "32 MiB a call");
    let told =
        |plan: &Plan| plan.in_words().into_iter().find(|line| line.contains("sandbox.memory_mb")).unwrap();
    assert!(!told(&few).contains("no room"), "{}", told(&few));
    assert!(
        told(&many).contains("33 calls") && told(&many).contains("lower sandbox.slots"),
        "{}",
        told(&many)
    );
    let stateful = with(1, 20 * GIB);
    assert_eq!(stateful.sandbox.at_most - few.sandbox.at_most, 20 * GIB);
    for part in
        ["chains between their calls", "no room: lower sandbox.slots, sandbox.memory_mb or sandbox.idle_"]
    {
        assert!(told(&stateful).contains(part), "{}", told(&stateful));
    }
}

#[test]
fn what_is_not_free_now_is_told_with_both_figures() {
    let model = small();
    let plan = plan(&work(&model), &cpu(24, 2)).unwrap();
    let both = 2 * plan.peak_bytes();
    assert_eq!(plan.lacks_now(both), None);
    let told = plan.lacks_now(GIB).unwrap();
    for part in ["2 ranks need", &bytes_in_words(both), "1.0 GiB are free now"] {
        assert!(told.contains(part), "{part}: {told}");
    }
}

#[test]
fn a_shared_optimizer_is_a_part_on_each_rank() {
    let model = small();
    let whole = plan(&work(&model), &cpu(24, 2)).unwrap().rank;
    let shared = plan(&Workload { optimizer_shards: 2, ..work(&model) }, &cpu(24, 2)).unwrap().rank;
    assert_eq!(shared.optimizer, whole.optimizer / 2);
    assert_eq!(shared.gradients, whole.gradients);
}

#[test]
fn a_job_that_cannot_fit_is_refused_with_its_parts_and_with_what_would() {
    let model = large();
    let told = plan(&work(&model), &cpu(24, 2)).unwrap_err().to_string();
    for part in
        ["a rank needs at least", "of the 24.0 GiB of this node, which 2 ranks share", "28.9 GiB of weights"]
    {
        assert!(told.contains(part), "{part}: {told}");
    }
    assert!(told.contains("No setting makes it fit") && told.contains("a smaller model"), "{told}");

    // What is offered is enough alone; where nothing is, all of it together.
    let model = small();
    let tight = Workload { precision: Precision::F32, reference: true, ..work(&model) };
    let refusal = plan(&tight, &cpu(8, 2)).unwrap_err();
    assert_eq!(refusal.memory_bytes, 8 * GIB);
    assert!(refusal.rank.total_bytes > refusal.budget_bytes);
    assert!(
        refusal.changes.iter().any(|change| change == "trainer.n_gpus_per_node=1 instead of 2"),
        "{refusal}"
    );
    assert!(plan(&tight, &cpu(8, 1)).is_ok(), "what is offered fits");
    let refusal = plan(&tight, &cpu(5, 2)).unwrap_err();
    assert_eq!(refusal.changes.len(), 1, "{refusal}");
    let all = &refusal.changes[0];
    for change in ["together", "dtype=bfloat16", "use_kl_loss=False", "n_gpus_per_node=1"] {
        assert!(all.contains(change), "{change}: {all}");
    }
    let smaller = Workload { precision: Precision::Bf16, reference: false, ..tight };
    assert!(plan(&smaller, &cpu(5, 1)).is_ok(), "what is offered fits");

    // Alone, a rank has all of the optimizer: a job that two ranks share is not told to take one where that needs more.
    let whole = Workload { window: Some(512), ..work(&model) };
    let shared = Workload { optimizer_shards: 8, ..whole };
    let node = Machine { memory_bytes: Some(4 * GIB - GIB / 4), ..cpu(0, 8) };
    let offers = |work: &Workload<'_>| plan(work, &node).unwrap_err().changes.join("; ");
    assert!(plan(&shared, &node.with_ranks(1)).is_ok(), "an eighth of it would fit one rank");
    assert!(!offers(&shared).contains("n_gpus_per_node"), "{}", offers(&shared));
}

#[test]
fn what_is_set_too_large_is_named_with_what_to_leave_out() {
    let model = small();
    let set = Workload { micro_batch: MicroBatch::Tokens(100_000), ..work(&model) };
    let refusal = plan(&set, &cpu(8, 1)).unwrap_err().to_string();
    assert!(
        refusal.contains("100000 tokens") && refusal.contains("ppo_max_token_len_per_gpu out"),
        "{refusal}"
    );
    let chains = Workload { micro_batch: MicroBatch::Chains(64), ..work(&model) };
    let refusal = plan(&chains, &cpu(8, 1)).unwrap_err().to_string();
    assert!(
        refusal.contains("65536 tokens") && refusal.contains("ppo_micro_batch_size_per_gpu out"),
        "{refusal}"
    );
    let long = Workload { window: Some(8192), may_recompute: false, ..work(&model) };
    let refusal = plan(&long, &cpu(6, 1)).unwrap_err().to_string();
    assert!(refusal.contains("actor_rollout_ref.rollout.max_model_len=4096"), "{refusal}");
    let offered = Workload { window: Some(4096), ..long };
    assert!(plan(&offered, &cpu(6, 1)).is_ok(), "what is offered fits");
}

#[test]
fn a_window_nobody_set_is_as_long_as_memory_allows_and_that_is_said() {
    let model = small();
    let unset = Workload { window: None, may_recompute: false, ..work(&model) };
    assert_eq!(plan(&unset, &cpu(24, 1)).unwrap().shortened_from, None);
    let plan = plan(&unset, &cpu(6, 1)).unwrap();
    assert!((1024..8192).contains(&plan.window) && plan.window.is_multiple_of(256), "{}", plan.window);
    assert_eq!(plan.shortened_from, Some(8192));
    assert!(plan.in_words().iter().any(|line| line.contains("max_model_len")), "{:?}", plan.in_words());
}

#[test]
fn activations_are_computed_again_only_where_they_do_not_fit_otherwise() {
    let model = small();
    let can = Workload { window: Some(8192), ..work(&model) };
    assert_eq!(plan(&can, &cpu(24, 1)).unwrap().recompute_above_tokens, None);
    let tight = plan(&can, &cpu(5, 1)).unwrap();
    let above = tight.recompute_above_tokens.unwrap();
    assert!(
        above < 8192 && tight.micro_batch_tokens <= above,
        "the usual micro-batch is not slowed: {tight:?}"
    );
    let refusal = plan(&Workload { may_recompute: false, ..can }, &cpu(5, 1)).unwrap_err();
    let way_out = "actor_rollout_ref.model.enable_gradient_checkpointing=True";
    assert!(refusal.changes.iter().any(|change| change == way_out), "{refusal}");
}

#[test]
fn memory_that_is_not_known_refuses_nothing() {
    let model = large();
    let unknown = Machine { kind: DeviceKind::Cuda, memory_bytes: None, ranks: 1, threads: 1 };
    let plan = plan(&work(&model), &unknown).unwrap();
    assert_eq!((plan.micro_batch_tokens, plan.budget_bytes), (16_384, None));
}

#[test]
fn words_are_short() {
    let words: Vec<_> = [17, 5 << 10, 300 << 20, 3 * GIB / 2].into_iter().map(bytes_in_words).collect();
    assert_eq!(words, ["17 B", "5 KiB", "300 MiB", "1.5 GiB"]);
}

proptest! {
    /// More of anything asked for never needs less, and less memory never gives more.
    #[test]
    fn needs_grow_with_what_is_asked_and_choices_shrink_with_memory(
        window in 64_u32..4096, more in 1_u32..2048, tokens in 128_u32..4096, gib in 3_u64..64, ranks in 1_u32..6,
        may_recompute: bool,
    ) {
        let model = small();
        let base = Workload { window: Some(window), micro_batch: MicroBatch::Tokens(tokens), may_recompute, ..work(&model) };
        let bytes = |work: &Workload<'_>, machine: &Machine| plan(work, machine).map(|plan| plan.rank).map_err(|no| no.rank);
        let room = cpu(4096, 1);
        let there = bytes(&base, &room).unwrap();
        let longer = bytes(&Workload { window: Some(window + more), ..base }, &room).unwrap();
        let bigger = bytes(&Workload { micro_batch: MicroBatch::Tokens(tokens + more), ..base }, &room).unwrap();
        let crowded = bytes(&Workload { chains: 65, ..base }, &room).unwrap();
        let referred = bytes(&Workload { reference: true, ..base }, &room).unwrap();
        prop_assert!(longer.kv_cache >= there.kv_cache && longer.total_bytes >= there.total_bytes);
        prop_assert!(bigger.activations > there.activations && bigger.total_bytes >= there.total_bytes);
        prop_assert!(crowded.rollout_workspace > there.rollout_workspace);
        prop_assert_eq!(referred.total_bytes, there.total_bytes + there.weights);

        let chosen = Workload { micro_batch: MicroBatch::Planned, ..base };
        if let Ok(tight) = plan(&chosen, &cpu(gib, ranks)) {
            let peak = tight.peak_bytes();
            prop_assert!(peak <= tight.budget_bytes.unwrap(), "{:?}", tight);
            prop_assert!(tight.cache_tokens >= u64::from(tight.window), "one chain always fits");
            let wide = plan(&chosen, &cpu(gib + 8, ranks)).unwrap();
            let alone = plan(&chosen, &cpu(gib, 1)).unwrap();
            for roomier in [wide, alone] {
                prop_assert!(roomier.micro_batch_tokens >= tight.micro_batch_tokens);
                prop_assert!(roomier.slots >= tight.slots);
                prop_assert!(roomier.slots > tight.slots || roomier.cache_tokens >= tight.cache_tokens);
            }
        }
    }

    /// Whatever the shape, a plan is made or refused, never a panic or an overflow.
    #[test]
    fn any_shape_gets_a_plan_or_a_refusal(
        hidden in 1_i64..65_536, layers in 1_i64..200, mlp in 1_i64..200_000, vocab in 1_i64..1_000_000, gib in 0_u64..512,
        may_recompute: bool,
    ) {
        let model = shape(hidden * 2, layers, (1, 1), mlp, vocab, true);
        let machine = cpu(gib, 2);
        match plan(&Workload { may_recompute, ..work(&model) }, &machine) {
            Ok(plan) => prop_assert!(plan.rank.total_bytes <= plan.budget_bytes.unwrap()),
            Err(refusal) => prop_assert!(refusal.rank.total_bytes > refusal.budget_bytes, "{}", refusal),
        }
    }
}
