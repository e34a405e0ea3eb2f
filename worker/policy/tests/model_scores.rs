//! Scores of texts: several together are each what it is alone, whatever is cut into pieces on the way; and a tied
//! head that is stored all the same must be the embedding.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking, too")]

mod support;

use agentfly_policy::model::{Decoder, ModelConfig, Scores, export, score, score_rows, visit_logits};
use support::{FAMILIES, config, full_logits, model, text};
use tch::{Device, Kind, Tensor};

fn close(what: &str, a: &[Option<f32>], b: &[Option<f32>]) {
    assert_eq!((a.len(), a[0]), (b.len(), None), "{what}");
    for (at, (a, b)) in a.iter().zip(b).enumerate().skip(1) {
        let (a, b) = (a.unwrap(), b.unwrap());
        assert!((a - b).abs() < 1e-5, "{what}, token {at}: {a} and {b}");
    }
}

#[test]
fn texts_scored_together_are_scored_as_alone() {
    for family in FAMILIES {
        let decoder = model(family, 11);
        let texts: Vec<Vec<u32>> =
            [1, 300, 2, 40, 270, 1].iter().enumerate().map(|(i, &length)| text(length, i as u32)).collect();
        let rows: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
        let together = score_rows(&decoder, &rows).unwrap();
        for (row, Scores { log_probs, entropies }) in rows.iter().zip(&together) {
            let alone = score_rows(&decoder, &[row]).unwrap().remove(0);
            let what = format!("{family}, {} tokens", row.len());
            close(&what, log_probs, &alone.log_probs);
            close(&what, entropies, &alone.entropies);
            close(&what, log_probs, &score(&decoder, row).unwrap());
        }
    }
    let decoder = model("qwen2", 11);
    assert!(score_rows(&decoder, &[]).is_err());
    let said = score_rows(&decoder, &[&[1, 2], &[3, 500]]).unwrap_err().to_string();
    assert!(said.contains("id 500"), "{said}");
}

#[test]
fn logits_are_visited_once_a_token_in_order() {
    // So large a vocabulary that a hundred tokens' logits are too many at a time.
    let config = ModelConfig { vocab: 400_000, hidden: 16, head_dim: 4, ..config("llama") };
    let decoder = Decoder::random(config, 12, Kind::Float, Device::Cpu).unwrap();
    let (first, second) = (text(60, 1), text(40, 2));
    let (mut next, mut parts) = (0, Vec::new());
    visit_logits(&decoder, &[&first, &second], |range, logits| {
        assert_eq!((range.start, range.len() as i64), (next, logits.size()[0]));
        next = range.end;
        parts.push(logits.shallow_clone());
        Ok(())
    })
    .unwrap();
    assert_eq!(next, 100);
    assert!(parts.len() > 1, "[tokens, vocab] exists whole");
    let expected = Tensor::cat(&[full_logits(&decoder, &first), full_logits(&decoder, &second)], 0);
    let off = (Tensor::cat(&parts, 0) - expected).abs().max().double_value(&[]);
    assert!(off < 1e-4, "{off}");
    let together = score_rows(&decoder, &[&first, &second]).unwrap();
    for (text, scores) in [first, second].iter().zip(&together) {
        close("cut across", &scores.log_probs, &score(&decoder, text).unwrap());
    }
}

#[test]
fn entropies_are_those_of_the_whole_distribution() {
    let decoder = model("qwen3", 13);
    let ids = text(30, 3);
    let entropies = score_rows(&decoder, &[&ids]).unwrap().remove(0).entropies;
    let log_probs = full_logits(&decoder, &ids).to_kind(Kind::Double).log_softmax(-1, Kind::Double);
    let expected = -(log_probs.exp() * log_probs).sum_dim_intlist([-1_i64].as_slice(), false, Kind::Double);
    for (at, got) in entropies.iter().enumerate().skip(1) {
        let expected = expected.double_value(&[at as i64 - 1]);
        assert!((f64::from(got.unwrap()) - expected).abs() < 1e-5, "token {at}: {got:?} is not {expected}");
    }
}

#[test]
fn a_tied_head_that_is_stored_must_be_the_embedding() {
    let decoder = model("qwen2", 14);
    let dir = tempfile::tempdir().unwrap();
    let mut named: Vec<(String, Tensor)> =
        decoder.parameters().iter().map(|(name, tensor)| (name.to_owned(), tensor.copy())).collect();
    let head = named[0].1.copy();
    named.push(("lm_head.weight".to_owned(), head.shallow_clone()));
    let mut untied = decoder.config().clone();
    untied.tie_word_embeddings = false;
    let load = || Decoder::load(dir.path(), Kind::Float, Device::Cpu).map_err(|e| e.to_string());
    let write = |named: &[(String, Tensor)]| {
        export(dir.path(), &untied, named, None).unwrap();
        let config = serde_json::Value::Object(decoder.config().to_json()).to_string();
        std::fs::write(dir.path().join("config.json"), config).unwrap();
    };
    write(&named);
    assert_eq!(load().unwrap().weights_hash().unwrap(), decoder.weights_hash().unwrap());
    let _same_tensor = head.get(5).get(7).fill_(9.0);
    write(&named);
    let said = load().unwrap_err();
    assert!(said.contains("`lm_head.weight` of ") && said.contains("`tie_word_embeddings`: false"), "{said}");
}
