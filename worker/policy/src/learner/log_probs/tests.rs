//! Rows that share their beginning, against each row alone.

use tch::{Device, Kind};

use super::*;
use crate::learner::config::MicroBatchLimit;
use crate::learner::plan::tests::{chains, rows};
use crate::model::{Architecture, ModelConfig};

fn model(kind: Kind) -> Decoder {
    tch::set_num_threads(1);
    let config = ModelConfig {
        architecture: Architecture::Qwen3,
        hidden: 48,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        intermediate: 80,
        vocab: crate::learner::plan::tests::VOCAB,
        rms_eps: 1e-6,
        rope_theta: 10_000.0,
        rope_scaling: None,
        tie_word_embeddings: false,
        max_position_embeddings: 1024,
        initializer_range: 0.2,
        eos_ids: vec![0],
        bos_id: None,
        pad_id: None,
        torch_dtype: None,
    };
    Decoder::random(config, 1, kind, Device::Cpu).unwrap()
}

fn under(micro_batch: MicroBatchLimit, temperature: f64) -> LearnerConfig {
    LearnerConfig { micro_batch, temperature, ..LearnerConfig::default() }
}

#[test]
fn rows_that_share_a_prompt_get_the_bits_that_each_gets_alone() {
    // Prompts that end within a page, with it, and after several; a chain that says nothing, and one of a single token.
    let chains = chains(&[
        (0, 63, &[10, 70, 1]),
        (1, 64, &[5, 64, 130]),
        (2, 65, &[40, 40]),
        (3, 150, &[30, 0, 45, 80]),
        (4, 2, &[9, 9]),
        (5, 20, &[33]),
    ]);
    let rows = rows(&chains);
    for kind in [Kind::Float, Kind::BFloat16] {
        let decoder = model(kind);
        if !decoder.is_batch_invariant() {
            eprintln!(
                "{kind:?} not checked: this CPU lacks the instructions, and libtorch's own products decide"
            );
            continue;
        }
        for temperature in [1.0, 0.7] {
            let alone: Vec<Vec<f32>> = chains
                .iter()
                .map(|chain| {
                    let row = self::rows(std::slice::from_ref(chain));
                    log_probs(&decoder, &row, &under(MicroBatchLimit::Tokens(2048), temperature))
                        .unwrap()
                        .remove(0)
                })
                .collect();
            assert!(alone.iter().flatten().all(|x| x.is_finite() && *x < 0.0));
            for limit in
                [MicroBatchLimit::Tokens(2048), MicroBatchLimit::Tokens(260), MicroBatchLimit::Rows(2)]
            {
                let planned = plan(&rows, limit, decoder.is_batch_invariant());
                assert!(
                    planned.iter().flatten().any(|alike| alike.common > 60),
                    "nothing shared: {planned:?}"
                );
                let together = log_probs(&decoder, &rows, &under(limit, temperature)).unwrap();
                assert_eq!(together, alone, "{kind:?} under {limit:?}");
            }
        }
    }
}
