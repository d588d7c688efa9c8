//! The comparison sees what it must see: each kind of damage, one at a time.

use approx::assert_relative_eq;
use hybridkv::reference::{Tolerance, compare};

const TOLERANCE: Tolerance =
    Tolerance { relative: 1e-3, worst_row: 4e-3, max_abs: 1e-2, cosine_distance: 1e-5 };

/// 64 rows of 16 pseudo-random elements in [-1, 1).
fn array() -> Vec<f64> {
    let mut x = 1u64;
    std::iter::repeat_with(|| {
        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (x >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    })
    .take(64 * 16)
    .collect()
}

fn verdict(ours: &[f64]) -> Option<String> {
    TOLERANCE.violation(&compare(ours, &array(), 16, 0.0))
}

#[test]
fn equal_arrays_have_no_error() {
    let c = compare(&array(), &array(), 16, 0.0);
    assert_eq!(Tolerance::EXACT.violation(&c), None);
    assert_eq!((c.relative, c.worst_row, c.max_abs, c.misplaced), (0.0, 0.0, 0.0, 0));
    assert_eq!(c.elements, 1024);
    assert!(c.cosine_distance < 1e-15);
}

#[test]
fn errors_are_what_they_are_called() {
    let scaled: Vec<f64> = array().iter().map(|x| x * 1.01).collect();
    let c = compare(&scaled, &array(), 16, 0.0);
    assert_relative_eq!(c.relative, 0.01, max_relative = 1e-9);
    assert_relative_eq!(c.worst_row, 0.01, max_relative = 1e-9);
    let opposite: Vec<f64> = array().iter().map(|x| -x).collect();
    assert_relative_eq!(
        compare(&opposite, &array(), 16, 0.0).cosine_distance,
        2.0,
        epsilon = 1e-12
    );
}

#[test]
fn small_noise_passes() {
    let noisy: Vec<f64> = array().iter().map(|x| x * (1.0 + 5e-4)).collect();
    assert_eq!(verdict(&noisy), None);
}

#[test]
fn one_nan_fails() {
    let mut ours = array();
    ours[700] = f64::NAN;
    assert!(verdict(&ours).unwrap().contains("1 elements are NaN"));
}

#[test]
fn infinities_must_be_in_place() {
    let mut reference = array();
    reference[5] = f64::NEG_INFINITY;
    let mut ours = reference.clone();
    assert_eq!(TOLERANCE.violation(&compare(&ours, &reference, 16, 0.0)), None);
    ours[5] = f64::INFINITY;
    assert_eq!(compare(&ours, &reference, 16, 0.0).misplaced, 1);
    ours[5] = -1e30;
    assert_eq!(compare(&ours, &reference, 16, 0.0).misplaced, 1);
}

#[test]
fn one_wrong_row_is_not_drowned() {
    // One row of 64 is 2 % off: 0.25 % of the whole at most, but the row shows it.
    let mut ours = array();
    for x in &mut ours[48 * 16..49 * 16] {
        *x *= 1.02;
    }
    let loose = Tolerance { relative: 1.0, max_abs: 1.0, cosine_distance: 1.0, ..TOLERANCE };
    let c = compare(&ours, &array(), 16, 0.0);
    assert_eq!(c.worst_row_index, 48);
    assert!(loose.violation(&c).unwrap().contains("row 48"));
}

#[test]
fn swapped_rows_fail() {
    let mut ours = array();
    let (a, b) = ours.split_at_mut(16);
    a.swap_with_slice(&mut b[..16]);
    assert!(verdict(&ours).is_some());
}

#[test]
fn missing_elements_fail() {
    let ours = array();
    assert!(verdict(&ours[..1000]).unwrap().contains("24 elements"));
}

#[test]
fn zeros_against_zeros_and_against_something() {
    let zeros = vec![0.0; 16];
    let c = compare(&zeros, &zeros, 16, 0.0);
    assert_eq!(Tolerance::EXACT.violation(&c), None);
    let mut ours = zeros.clone();
    ours[3] = 1e-30;
    assert!(TOLERANCE.violation(&compare(&ours, &zeros, 16, 0.0)).is_some());
    assert!(verdict(&[0.0; 1024]).is_some());
}

#[test]
fn differences_below_the_floor_are_none() {
    // A row that rounds to 0 in the type is no error; one just above the floor is.
    let tiny = [3e-8; 16];
    assert_eq!(TOLERANCE.violation(&compare(&[0.0; 16], &tiny, 16, 4e-8)), None);
    assert!(TOLERANCE.violation(&compare(&[0.0; 16], &tiny, 16, 2e-8)).is_some());
}
