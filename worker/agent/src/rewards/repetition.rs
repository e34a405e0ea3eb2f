//! How repetitive a text is: the measure by which AgentFly leaves long answers unparsed.
//!
//! Called before an answer goes to Python. Pure, and linear in the text's length but for the transitions' lookups.

use std::collections::BTreeMap;

/// A text is repetitive when more than this part of its substrings occurred before.
const REPEATED_SHARE: f64 = 0.2;

/// Whether more than a fifth of the text's substrings are repetitions of others. (AgentFly sums the longest common
/// prefixes of neighbours in a suffix array, which is the number of substrings less the number of distinct ones.)
pub(super) fn is_repetitive(text: &str) -> bool {
    let length = text.chars().count() as f64;
    let all = length * (length + 1.0) / 2.0;
    length > 1.0 && (all - distinct_substrings(text) as f64) / all > REPEATED_SHARE
}

/// A state of the suffix automaton: substrings that end at the same places.
#[derive(Debug, Clone, Default)]
struct State {
    longest: u64,
    link: Option<usize>,
    next: BTreeMap<char, usize>,
}

/// How many different substrings a text has, by its suffix automaton (Blumer et al. 1985).
fn distinct_substrings(text: &str) -> u64 {
    let mut states = vec![State::default()];
    let (mut last, mut count) = (0, 0);
    for c in text.chars() {
        let new = states.len();
        states.push(State { longest: states[last].longest + 1, ..State::default() });
        let mut at = Some(last);
        while let Some(state) = at.filter(|&state| !states[state].next.contains_key(&c)) {
            states[state].next.insert(c, new);
            at = states[state].link;
        }
        let link = at.map_or(0, |state| target(&mut states, state, c));
        states[new].link = Some(link);
        // What a new character adds: the suffixes that no earlier state has.
        count += states[new].longest - states[link].longest;
        last = new;
    }
    count
}

/// The state behind `state` by `c` that holds nothing longer than that step; split off if there is none.
fn target(states: &mut Vec<State>, state: usize, c: char) -> usize {
    let behind = states[state].next[&c];
    let longest = states[state].longest + 1;
    if states[behind].longest == longest {
        return behind;
    }
    let split = states.len();
    let copy = State { longest, ..states[behind].clone() };
    states.push(copy);
    states[behind].link = Some(split);
    let mut at = Some(state);
    while let Some(state) = at.filter(|&state| states[state].next.get(&c) == Some(&behind)) {
        states[state].next.insert(c, split);
        at = states[state].link;
    }
    split
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn long_runs_are_repetitive_and_long_formulas_are_not() {
        assert!(is_repetitive(&"a".repeat(129)) && is_repetitive(&"12".repeat(80)));
        assert!(is_repetitive(&"x+".repeat(50_000)), "and that is found at once");
        let sum: Vec<String> = (1..60).map(|n| format!("{n}x^{{{n}}}")).collect();
        assert!(!is_repetitive(&sum.join("+")));
        assert!(!is_repetitive("") && !is_repetitive("a"));
    }

    proptest::proptest! {
        #[test]
        fn counting_agrees_with_listing(text in "[abé]{0,30}") {
            let chars: Vec<char> = text.chars().collect();
            let listed: HashSet<&[char]> =
                (0..chars.len()).flat_map(|i| (i + 1..=chars.len()).map(move |j| (i, j))).map(|(i, j)| &chars[i..j]).collect();
            proptest::prop_assert_eq!(distinct_substrings(&text), listed.len() as u64);
        }
    }
}
