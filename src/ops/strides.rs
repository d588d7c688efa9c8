//! Strides of tokens and heads, of tensors that operations read and write.

use crate::device::Span;
use crate::error::{Error, Result};
use crate::layout::Dtype;

/// Strides in elements of a `[token, head, head_dim]` tensor whose last dimension is contiguous.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadStrides {
    /// Between tokens.
    pub token: i64,
    /// Between heads.
    pub head: i64,
}

impl HeadStrides {
    /// Strides of a contiguous `[token, head, head_dim]` tensor.
    pub const fn contiguous(num_heads: u32, head_dim: u32) -> Self {
        Self { token: num_heads as i64 * head_dim as i64, head: head_dim as i64 }
    }

    /// Checks a `[tokens, heads, head_dim]` tensor of these strides: rows at multiples of 16 bytes, all of
    /// them inside of `span`.
    #[allow(clippy::too_many_arguments, reason = "the tensor's name, place, shape and type")]
    pub(super) fn check(
        &self,
        op: &'static str,
        what: &str,
        span: &Span,
        tokens: u32,
        heads: u32,
        head_dim: u32,
        dtype: Dtype,
    ) -> Result<()> {
        let row = 16 / dtype.bytes() as i64;
        for (name, stride) in [("token", self.token), ("head", self.head)] {
            if stride % row != 0 {
                return Err(Error::invalid(
                    op,
                    format!(
                        "{name} stride of {what}, {stride} elements, is no multiple of 16 bytes"
                    ),
                ));
            }
        }
        let last = |count: u32, stride: i64| {
            u64::try_from(stride).ok()?.checked_mul(u64::from(count.saturating_sub(1)))
        };
        let bytes = last(tokens, self.token)
            .and_then(|x| x.checked_add(last(heads, self.head)?))
            .and_then(|x| x.checked_add(u64::from(head_dim)))
            .and_then(|x| x.checked_mul(dtype.bytes() as u64))
            .ok_or_else(|| {
                Error::invalid(
                    op,
                    format!(
                        "the strides of {what} ({}, {}) are negative or overflow 64-bit addresses",
                        self.token, self.head
                    ),
                )
            })?;
        span.check(op, what, bytes, 16)
    }

    /// Checks that no two rows of a tensor that is written overlap.
    pub(super) fn check_disjoint(
        &self,
        op: &'static str,
        what: &str,
        tokens: u32,
        heads: u32,
        head_dim: u32,
    ) -> Result<()> {
        // One dimension lies inside of a step of the other, a row inside of the smaller step.
        let nested = |inner: i64, count: u32, outer: i64, outer_count: u32| {
            let row = i64::from(head_dim);
            let extent = inner.checked_mul(i64::from(count) - 1).and_then(|x| x.checked_add(row));
            (count < 2 || inner >= row) && (outer_count < 2 || extent.is_some_and(|x| x <= outer))
        };
        if nested(self.head, heads, self.token, tokens)
            || nested(self.token, tokens, self.head, heads)
        {
            return Ok(());
        }
        Err(Error::invalid(
            op,
            format!(
                "rows of {what} overlap: {tokens} tokens {} elements apart, {heads} heads {} apart, rows of {head_dim}",
                self.token, self.head
            ),
        ))
    }
}
