//! The Hadamard rotation of a token's head, which spreads outliers over all of its elements.
//!
//! A row of `head_dim` elements is cut into runs of the largest power of two that divides it, and each run is
//! multiplied by the orthonormal Hadamard matrix of that order: its own inverse. In f32, stage by stage from
//! neighbours outwards, so that CPU and GPU agree to the bit.

/// Length of the runs.
pub(super) const fn order(head_dim: usize) -> usize {
    1 << head_dim.trailing_zeros()
}

/// Rotates a row in place; rotated twice, it is what it was but for rounding.
pub(super) fn rotate(row: &mut [f32]) {
    let order = order(row.len());
    let factor = 1.0 / (order as f32).sqrt();
    for run in row.chunks_exact_mut(order) {
        let mut distance = 1;
        while distance < order {
            for pair in run.chunks_exact_mut(2 * distance) {
                let (low, high) = pair.split_at_mut(distance);
                for (a, b) in low.iter_mut().zip(high) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            distance *= 2;
        }
        for x in run {
            *x *= factor;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rotation_is_its_own_inverse_and_keeps_the_norm() {
        for head_dim in [64, 96, 128, 256] {
            let row: Vec<f32> = (0..head_dim).map(|i| ((i * 37 + 11) % 64) as f32 - 31.0).collect();
            let norm = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>().sqrt();
            let mut rotated = row.clone();
            rotate(&mut rotated);
            assert!((norm(&rotated) / norm(&row) - 1.0).abs() < 1e-5);
            assert!(rotated.iter().zip(&row).any(|(x, y)| (x - y).abs() > 1.0));
            rotate(&mut rotated);
            assert!(rotated.iter().zip(&row).all(|(x, y)| (x - y).abs() < 1e-4));
        }
    }

    #[test]
    fn one_outlier_is_spread_evenly() {
        let mut row = vec![0.0; 64];
        row[5] = 8.0;
        rotate(&mut row);
        assert!(row.iter().all(|x| x.abs() == 1.0));
    }
}
