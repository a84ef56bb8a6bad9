//! Multimodal rotary position ids (Qwen2-VL's `get_rope_index`). In: token ids and image grids.
//! Out: `[3, T]`.

#![warn(clippy::indexing_slicing)]

use ndarray::Array2;

use super::Error;

/// Temporal, height and width position of every token, `[3, T]`.
///
/// Text counts up on all three rows together, from one past the largest position before it. An
/// image's tokens, `t·h·w / merge²` of them, hold their frame, row and column in the merged grid,
/// each offset by the position where the image starts.
///
/// # Errors
/// [`Error::ImageTokens`] where the image tokens are not exactly the runs that `grids` call for.
pub fn position_ids(
    input_ids: &[i64],
    image_token_id: i64,
    grids: &[[i64; 3]],
    merge_size: i64,
) -> Result<Array2<i64>, Error> {
    let found = input_ids.iter().filter(|&&id| id == image_token_id).count();
    let mut expected = 0;
    let mut columns: Vec<[i64; 3]> = Vec::with_capacity(input_ids.len());
    let mut next = 0;
    let mut grids = grids.iter();
    while let Some(id) = input_ids.get(columns.len()) {
        if *id != image_token_id {
            columns.push([next; 3]);
            next += 1;
            continue;
        }
        let Some(&[frames, patch_rows, patch_columns]) = grids.next() else {
            return Err(Error::ImageTokens { expected, found });
        };
        let (start, merge) = (columns.len(), merge_size.max(1));
        let (height, width) = (patch_rows / merge, patch_columns / merge);
        for frame in 0..frames {
            for row in 0..height {
                for column in 0..width {
                    if input_ids.get(columns.len()) != Some(&image_token_id) {
                        let wanted =
                            usize::try_from(frames.saturating_mul(height).saturating_mul(width))
                                .unwrap_or(usize::MAX);
                        return Err(Error::ImageTokens {
                            expected: start.saturating_add(wanted),
                            found,
                        });
                    }
                    columns.push([next + frame, next + row, next + column]);
                }
            }
        }
        if columns.len() == start {
            return Err(Error::ImageTokens { expected, found });
        }
        expected += columns.len() - start;
        next += frames.max(height).max(width);
    }
    if grids.next().is_some() {
        return Err(Error::ImageTokens {
            expected: expected + 1,
            found,
        });
    }
    Ok(Array2::from_shape_fn(
        (3, columns.len()),
        |(axis, token)| {
            columns
                .get(token)
                .and_then(|column| column.get(axis))
                .copied()
                .unwrap_or_default()
        },
    ))
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn text_alone_counts_up_on_all_rows() {
        assert_eq!(
            position_ids(&[5, 6, 7], 9, &[], 2).unwrap(),
            array![[0, 1, 2], [0, 1, 2], [0, 1, 2]]
        );
    }

    #[test]
    fn an_image_is_row_major_from_its_start_and_text_goes_on_after_the_largest() {
        // The picture of transformers' own docstring, with one frame: 2 × 3 merged patches between
        // text.
        let ids = [1, 9, 9, 9, 9, 9, 9, 2, 3];
        assert_eq!(
            position_ids(&ids, 9, &[[1, 4, 6]], 2).unwrap(),
            array![
                [0, 1, 1, 1, 1, 1, 1, 4, 5],
                [0, 1, 1, 1, 2, 2, 2, 4, 5],
                [0, 1, 2, 3, 1, 2, 3, 4, 5]
            ]
        );
    }

    #[test]
    fn image_tokens_that_do_not_fit_the_grids_are_an_error() {
        for (ids, grids) in [
            (&[1, 9, 9][..], &[][..]),
            (&[1, 9, 2][..], &[[1, 2, 4]][..]),
            (&[1, 9, 9, 9][..], &[[1, 2, 4]][..]),
            (&[1, 2][..], &[[1, 2, 2]][..]),
            (&[9][..], &[[0, 0, 0]][..]),
        ] {
            assert!(
                matches!(
                    position_ids(ids, 9, grids, 2),
                    Err(Error::ImageTokens { .. })
                ),
                "{ids:?}"
            );
        }
    }
}
