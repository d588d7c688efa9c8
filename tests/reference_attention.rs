//! The reference against values worked out by hand, and against itself formulated another way.

use approx::assert_relative_eq;
use hybridkv::reference::{Logits, State, attend, merge, sees};
use hybridkv::spec::AttentionKind::{self, Chunked, Full, Sliding};
use proptest::prelude::*;

const PLAIN: Logits = Logits { sm_scale: 1.0, soft_cap: 0.0, sink: None };

fn visible(kind: AttentionKind, sinks: u32, query: i64) -> Vec<i64> {
    (-2..query + 3).filter(|&key| sees(kind, sinks, query, key)).collect()
}

#[test]
fn visibility_by_hand() {
    assert_eq!(visible(Full, 0, 3), [0, 1, 2, 3]);
    // A window of 2 is the token itself and one before it.
    assert_eq!(visible(Sliding { window: 2 }, 0, 5), [4, 5]);
    assert_eq!(visible(Sliding { window: 1 }, 0, 5), [5]);
    assert_eq!(visible(Sliding { window: 9 }, 0, 3), [0, 1, 2, 3]);
    // Chunks of 4: position 7 is the last of the second, position 8 sees only itself.
    assert_eq!(visible(Chunked { chunk: 4 }, 0, 7), [4, 5, 6, 7]);
    assert_eq!(visible(Chunked { chunk: 4 }, 0, 8), [8]);
    assert_eq!(visible(Chunked { chunk: 4 }, 2, 9), [0, 1, 8, 9]);
    // Sinks are still causal.
    assert_eq!(visible(Sliding { window: 1 }, 4, 2), [0, 1, 2]);
    assert_eq!(visible(Full, 4, -1), [0i64; 0]);
}

#[test]
fn two_keys_by_hand() {
    // Logits ln 3 and 0: weights 3/4 and 1/4.
    let keys = [3f64.ln(), 0.0, 0.0, 7.0];
    let values = [4.0, 8.0, -4.0, 0.0];
    let state = attend(&[1.0, 0.0], &keys, &values, &[0, 1], PLAIN);
    assert_relative_eq!(state.out[0], 2.0, epsilon = 1e-15);
    assert_relative_eq!(state.out[1], 6.0, epsilon = 1e-15);
    assert_relative_eq!(state.lse, 4f64.ln(), epsilon = 1e-15);
    // Only the second key: its value, its logit.
    let state = attend(&[1.0, 0.0], &keys, &values, &[1], PLAIN);
    assert_eq!(state, State { out: vec![-4.0, 0.0], lse: 0.0 });
}

#[test]
fn sink_logit_by_hand() {
    // exp(ln 2) beside two logits of 0: the values get 1/4 each, the LSE is ln 4.
    let logits = Logits { sink: Some(2f64.ln()), ..PLAIN };
    let state = attend(&[0.0], &[5.0, 6.0], &[4.0, 8.0], &[0, 1], logits);
    assert_relative_eq!(state.out[0], 3.0, epsilon = 1e-15);
    assert_relative_eq!(state.lse, 4f64.ln(), epsilon = 1e-15);
    // Nothing visible: no value, and the sink alone in the denominator.
    let state = attend(&[0.0], &[], &[], &[], logits);
    assert_eq!(state.out, [0.0]);
    assert_relative_eq!(state.lse, 2f64.ln(), epsilon = 1e-15);
}

#[test]
fn soft_cap_and_scale_by_hand() {
    let logits = Logits { sm_scale: 0.5, soft_cap: 10.0, sink: None };
    let state = attend(&[2.0], &[1e9], &[3.0], &[0], logits);
    assert_eq!(state.lse, 10.0);
    let state = attend(&[2.0], &[4.0], &[3.0], &[0], logits);
    assert_relative_eq!(state.lse, 10.0 * 0.4f64.tanh(), epsilon = 1e-15);
}

#[test]
fn empty_states() {
    assert_eq!(attend(&[1.0, 2.0], &[], &[], &[], PLAIN), State::empty(2));
    assert_eq!(merge(2, &[State::empty(2), State::empty(2)], None), State::empty(2));
    let state = State { out: vec![1.0, -1.0], lse: 3.0 };
    // The identity is recognised by its LSE alone: its output may hold anything.
    let garbage = State { out: vec![f64::NAN; 2], lse: f64::NEG_INFINITY };
    assert_eq!(merge(2, &[garbage, state.clone()], None), state);
    // No state at all, with and without a sink.
    assert_eq!(merge(2, &[], None), State::empty(2));
    assert_eq!(merge(2, &[], Some(1.5)), State { out: vec![0.0; 2], lse: 1.5 });
}

#[test]
fn nan_is_not_hidden() {
    let state = attend(&[1.0], &[f64::NAN, 0.0], &[1.0, 1.0], &[0, 1], PLAIN);
    assert!(state.out[0].is_nan() && state.lse.is_nan());
    // ... but what is not listed is not read.
    let state = attend(&[1.0], &[f64::NAN, 0.0], &[f64::NAN, 1.0], &[1], PLAIN);
    assert_eq!(state, State { out: vec![1.0], lse: 0.0 });
}

/// Softmax without its maximum subtracted, all in one expression per element: another formulation.
fn naive(query: &[f64], keys: &[f64], values: &[f64], n: usize, logits: Logits) -> State {
    let d = query.len();
    let weight = |j: usize| {
        let x = logits.sm_scale * (0..d).map(|c| query[c] * keys[j * d + c]).sum::<f64>();
        if logits.soft_cap > 0.0 { logits.soft_cap * (x / logits.soft_cap).tanh() } else { x }.exp()
    };
    let sum = (0..n).map(weight).sum::<f64>() + logits.sink.map_or(0.0, f64::exp);
    let column = |c: usize| (0..n).map(|j| weight(j) * values[j * d + c]).sum::<f64>() / sum;
    State { out: (0..d).map(column).collect(), lse: sum.ln() }
}

fn assert_close(a: &State, b: &State) -> Result<(), TestCaseError> {
    let close = |x: f64, y: f64| x == y || (x - y).abs() <= 1e-11 * (1.0 + x.abs());
    prop_assert!(close(a.lse, b.lse), "lse {} and {}", a.lse, b.lse);
    prop_assert_eq!(a.out.len(), b.out.len());
    for (x, y) in a.out.iter().zip(&b.out) {
        prop_assert!(close(*x, *y), "{} and {}", x, y);
    }
    Ok(())
}

/// A query, `n` keys and values of `d` elements, and a way to make logits of them.
fn problem() -> impl Strategy<Value = (Vec<f64>, Vec<f64>, Vec<f64>, usize, Logits)> {
    (1usize..40, prop::sample::select(vec![1usize, 3, 8, 20])).prop_flat_map(|(n, d)| {
        let vector = |len| prop::collection::vec(-2.0..2.0f64, len);
        let logits = (0.1..1.0f64, prop::sample::select(vec![0.0, 5.0, 30.0])).prop_flat_map(
            |(sm_scale, soft_cap)| {
                prop::option::of(-3.0..3.0f64).prop_map(move |sink| Logits {
                    sm_scale,
                    soft_cap,
                    sink,
                })
            },
        );
        (vector(d), vector(n * d), vector(n * d), Just(n), logits)
    })
}

proptest! {
    #[test]
    fn equals_another_formulation((q, k, v, n, logits) in problem()) {
        let all: Vec<usize> = (0..n).collect();
        assert_close(&attend(&q, &k, &v, &all, logits), &naive(&q, &k, &v, n, logits))?;
    }

    /// Cutting the keys anywhere and merging the states changes nothing; the sink joins once, at the end.
    #[test]
    fn splits_merge_to_the_whole(
        (q, k, v, n, logits) in problem(),
        cuts in prop::collection::vec(0usize..40, 0..5),
    ) {
        let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(n)).chain([0, n]).collect();
        cuts.sort_unstable();
        let parts: Vec<State> = cuts
            .windows(2)
            .map(|w| {
                let part: Vec<usize> = (w[0]..w[1]).collect();
                attend(&q, &k, &v, &part, Logits { sink: None, ..logits })
            })
            .collect();
        let all: Vec<usize> = (0..n).collect();
        assert_close(&merge(q.len(), &parts, logits.sink), &attend(&q, &k, &v, &all, logits))?;
    }

    /// Where the keys lie does not matter: a permuted pool with a permuted list is the same attention.
    #[test]
    fn order_of_keys_does_not_matter((q, k, v, n, logits) in problem(), seed in any::<u64>()) {
        let d = q.len();
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by_key(|&j| (j as u64 + 1).wrapping_mul(seed | 1));
        let permute = |a: &[f64]| order.iter().flat_map(|&j| a[j * d..][..d].to_vec()).collect::<Vec<_>>();
        let all: Vec<usize> = (0..n).collect();
        assert_close(
            &attend(&q, &permute(&k), &permute(&v), &all, logits),
            &attend(&q, &k, &v, &all, logits),
        )?;
    }

    /// A window or a chunk that reaches back to the start is full attention.
    #[test]
    fn wide_enough_is_full(query in 0i64..500, extra in 1u32..50, key in -5i64..505) {
        let extent = query as u32 + extra;
        let full = sees(Full, 0, query, key);
        prop_assert_eq!(sees(Sliding { window: extent }, 0, query, key), full);
        prop_assert_eq!(sees(Chunked { chunk: extent }, 0, query, key), full);
    }

    /// What is visible, counted: a window holds `min(i + 1, W)` keys, a chunk `i % C + 1`; with sinks,
    /// those before the window come on top. The query always sees itself and never the future.
    #[test]
    fn visible_counts(query in 0i64..300, extent in 1u32..80, sinks in 0u32..40) {
        let count = |kind, sinks| visible(kind, sinks, query).len() as i64;
        let (window, chunk) = (Sliding { window: extent }, Chunked { chunk: extent });
        let e = i64::from(extent);
        prop_assert_eq!(count(window, 0), (query + 1).min(e));
        prop_assert_eq!(count(chunk, 0), query % e + 1);
        let before_window = (query + 1 - e).max(0);
        prop_assert_eq!(count(window, sinks), (query + 1).min(e) + before_window.min(sinks.into()));
        let before_chunk = query / e * e;
        prop_assert_eq!(count(chunk, sinks), query % e + 1 + before_chunk.min(sinks.into()));
        for kind in [Full, window, chunk] {
            prop_assert!(sees(kind, sinks, query, query));
            prop_assert!(!sees(kind, sinks, query, query + 1));
        }
    }
}
