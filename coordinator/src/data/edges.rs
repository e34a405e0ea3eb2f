//! Tests of questions at their edges: files at a limit, rows at the end of what may be written, and subsets that
//! must be drawn and not taken from the front.

use std::path::PathBuf;

use agentfly_common::row::Reference;

use super::{Cursor, Dataset, Limits, Need, Order};

fn load(name: &str, content: &[u8], limits: Limits) -> Result<Dataset, String> {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    let prefix = format!("{}/", folder.path().display());
    let need = Need { reward: "math_equal_reward", reference: Reference::Answer };
    Dataset::load(&[path], &need, limits).map_err(|error| error.to_string().replace(&prefix, ""))
}

#[test]
fn a_file_of_exactly_the_limit_is_read() {
    let list = br#"[{"question":"q","answer":"1"}]"#;
    let limits = |file_bytes: usize| Limits { file_bytes: file_bytes as u64 };
    assert_eq!(load("a.json", list, limits(list.len())).unwrap().len(), 1);
    assert!(load("a.json", list, limits(list.len() - 1)).unwrap_err().contains("more than the 30"));
}

#[test]
fn a_character_that_straddles_the_first_look_into_the_file_is_no_fault() {
    for shift in 0..3 {
        let list = format!(r#"[{{"question":"{}{}","answer":"1"}}]"#, "x".repeat(shift), "€".repeat(3000));
        let data = load("a.json", list.as_bytes(), Limits::default()).unwrap();
        assert_eq!(data.rows()[0].text.chars().count(), 3000 + shift);
    }
}

#[test]
fn rows_of_json_lines_are_counted_as_an_editor_counts_them() {
    let lines = b"{\"question\":\"a\",\"answer\":\"1\"}\n\n{\"question\":\"b\"}\n";
    let told = load("a.jsonl", lines, Limits::default()).unwrap_err();
    assert!(told.starts_with("a.jsonl, row 3: no \"answer\""), "{told}");
}

#[test]
fn whole_numbers_of_any_size_and_sign_are_ids() {
    let list =
        br#"[{"id":-3,"question":"q","answer":"1"},{"id":18446744073709551615,"question":"q","answer":"1"}]"#;
    let data = load("a.json", list, Limits::default()).unwrap();
    let ids: Vec<&str> = data.rows().iter().map(|row| row.id.as_str()).collect();
    assert_eq!(ids, ["-3", "18446744073709551615"]);
}

#[test]
fn a_wrong_value_is_shown_up_to_forty_characters() {
    let of = |characters: usize| {
        let list =
            format!(r#"[{{"question":"q","answer":1,"data_source":1}}, "{}"]"#, "x".repeat(characters));
        load("a.json", list.replace(",\"data_source\":1", "").as_bytes(), Limits::default()).unwrap_err()
    };
    assert!(of(40).ends_with(&format!("found the string \"{}\"", "x".repeat(40))), "{}", of(40));
    assert!(of(41).ends_with(&format!("found the string \"{}…\"", "x".repeat(40))), "{}", of(41));
}

fn subset(seed: u64) -> Vec<usize> {
    let mut order = Order::new(100, Some(10), seed, false);
    order.next_batch(&mut Cursor::default(), 10)
}

#[test]
fn a_limited_data_set_is_a_random_part_of_all_rows_that_the_seed_alone_decides() {
    let drawn = subset(1);
    assert!(drawn.iter().any(|&row| row >= 10), "not the first ten: {drawn:?}");
    assert!(drawn.is_sorted(), "in file order where there is no shuffle: {drawn:?}");
    assert_eq!(drawn, subset(1));
    assert_ne!(drawn, subset(2));
}

#[test]
fn every_place_of_the_order_is_shuffled() {
    let orders = |rows: usize| -> std::collections::BTreeSet<Vec<usize>> {
        let deal = |seed| Order::new(rows, None, seed, true).next_batch(&mut Cursor::default(), rows);
        (0..200).map(deal).collect()
    };
    assert_eq!(orders(2).len(), 2, "both orders of two rows occur");
    assert_eq!(orders(3).len(), 6, "all orders of three rows occur");
}
