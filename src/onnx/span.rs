//! A byte range of a file.

/// A range of bytes in one file: `offset .. offset + len`, in bytes from the file's start.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct ByteSpan {
    /// Bytes from the start of the file.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

impl ByteSpan {
    /// The first byte after the span, or `None` where the sum does not fit in 64 bits.
    pub fn end(self) -> Option<u64> {
        self.offset.checked_add(self.len)
    }

    /// Whether the two spans share at least one byte. Empty spans share none.
    pub fn overlaps(self, other: ByteSpan) -> bool {
        self.len > 0
            && other.len > 0
            && self.offset < other.offset.saturating_add(other.len)
            && other.offset < self.offset.saturating_add(self.len)
    }
}

impl std::fmt::Display for ByteSpan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "bytes {}..{}",
            self.offset,
            self.offset.saturating_add(self.len)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::ByteSpan;

    #[test]
    fn neighbours_do_not_overlap() {
        let a = ByteSpan { offset: 0, len: 4 };
        assert!(!a.overlaps(ByteSpan { offset: 4, len: 4 }));
        assert!(a.overlaps(ByteSpan { offset: 3, len: 1 }));
        assert!(!a.overlaps(ByteSpan { offset: 2, len: 0 }));
    }

    #[test]
    fn an_end_beyond_64_bits_is_none() {
        assert_eq!(
            ByteSpan {
                offset: u64::MAX,
                len: 1
            }
            .end(),
            None
        );
    }
}
