//! Tensors that a family hands to the model's graphs, under the names that its processor gives them.
//!
//! A graph is fed what it asks for by name: a tensor that it does not name is left out, so a family
//! gives all that its processor makes, and exports that take less are served too.

use ndarray::{ArrayD, Axis, Slice};

/// A tensor with the name of the graph input that it is for.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedTensor {
    /// `pixel_values`, `image_grid_thw`, `image_sizes`, `pixel_attention_mask`, `token_type_ids`, …
    pub name: String,
    /// Shape and numbers.
    pub value: TensorValue,
}

/// The element types that processors make. A graph that stores the same thing in another width
/// (float16 pixels, an int64 mask) gets it converted.
#[derive(Debug, Clone, PartialEq)]
pub enum TensorValue {
    /// float32.
    Floats(ArrayD<f32>),
    /// int64.
    Integers(ArrayD<i64>),
    /// bool.
    Booleans(ArrayD<bool>),
}

impl NamedTensor {
    /// A float32 tensor.
    pub fn floats<D: ndarray::Dimension>(name: &str, array: ndarray::Array<f32, D>) -> NamedTensor {
        NamedTensor {
            name: name.to_owned(),
            value: TensorValue::Floats(array.into_dyn()),
        }
    }

    /// What the numbers take of memory.
    pub(crate) fn bytes(&self) -> usize {
        match &self.value {
            TensorValue::Floats(array) => array.len() * size_of::<f32>(),
            TensorValue::Integers(array) => array.len() * size_of::<i64>(),
            TensorValue::Booleans(array) => array.len(),
        }
    }

    /// An int64 tensor.
    pub fn integers<D: ndarray::Dimension>(
        name: &str,
        array: ndarray::Array<i64, D>,
    ) -> NamedTensor {
        NamedTensor {
            name: name.to_owned(),
            value: TensorValue::Integers(array.into_dyn()),
        }
    }

    /// A bool tensor.
    pub fn booleans<D: ndarray::Dimension>(
        name: &str,
        array: ndarray::Array<bool, D>,
    ) -> NamedTensor {
        NamedTensor {
            name: name.to_owned(),
            value: TensorValue::Booleans(array.into_dyn()),
        }
    }
}

impl TensorValue {
    /// The dimensions.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        match self {
            Self::Floats(array) => array.shape(),
            Self::Integers(array) => array.shape(),
            Self::Booleans(array) => array.shape(),
        }
    }

    /// The same numbers with leading axes of length 1 added or dropped until there are `rank` axes, as
    /// far as that goes: exports differ in whether they keep a batch axis.
    #[must_use]
    pub fn with_rank(&self, rank: usize) -> TensorValue {
        fn fit<T: Clone>(array: &ArrayD<T>, rank: usize) -> ArrayD<T> {
            let mut array = array.clone();
            while array.ndim() < rank {
                array.insert_axis_inplace(Axis(0));
            }
            while array.ndim() > rank && array.len_of(Axis(0)) == 1 {
                array = array.index_axis_move(Axis(0), 0);
            }
            array
        }
        match self {
            Self::Floats(array) => Self::Floats(fit(array, rank)),
            Self::Integers(array) => Self::Integers(fit(array, rank)),
            Self::Booleans(array) => Self::Booleans(fit(array, rank)),
        }
    }

    /// The last entry along `axis`, which stays with length 1.
    #[must_use]
    pub fn last(&self, axis: usize) -> TensorValue {
        fn cut<T: Clone>(array: &ArrayD<T>, axis: usize) -> ArrayD<T> {
            if axis >= array.ndim() || array.len_of(Axis(axis)) == 0 {
                return array.clone();
            }
            array
                .slice_axis(Axis(axis), Slice::from(-1..))
                .as_standard_layout()
                .into_owned()
        }
        match self {
            Self::Floats(array) => Self::Floats(cut(array, axis)),
            Self::Integers(array) => Self::Integers(cut(array, axis)),
            Self::Booleans(array) => Self::Booleans(cut(array, axis)),
        }
    }

    /// One more entry along `axis`, equal to the last.
    #[must_use]
    pub fn with_last_repeated(&self, axis: usize) -> TensorValue {
        fn grow<T: Clone>(array: &ArrayD<T>, last: &ArrayD<T>, axis: usize) -> ArrayD<T> {
            ndarray::concatenate(Axis(axis), &[array.view(), last.view()])
                .unwrap_or_else(|_| array.clone())
        }
        match (self, self.last(axis)) {
            (Self::Floats(array), Self::Floats(last)) if axis < array.ndim() => {
                Self::Floats(grow(array, &last, axis))
            }
            (Self::Integers(array), Self::Integers(last)) if axis < array.ndim() => {
                Self::Integers(grow(array, &last, axis))
            }
            (Self::Booleans(array), Self::Booleans(last)) if axis < array.ndim() => {
                Self::Booleans(grow(array, &last, axis))
            }
            (unchanged, _) => unchanged.clone(),
        }
    }

    /// Several samples' tensors as one batch, along axis 0. Along `token_axis` shorter ones are filled
    /// with zeros (false) at the end. `None` where types or other dimensions differ.
    #[must_use]
    pub fn stack(values: &[&TensorValue], token_axis: Option<usize>) -> Option<TensorValue> {
        fn join<T: Clone + Default>(
            arrays: &[&ArrayD<T>],
            token_axis: Option<usize>,
        ) -> Option<ArrayD<T>> {
            let Some(axis) = token_axis else {
                let views: Vec<_> = arrays.iter().map(|array| array.view()).collect();
                return ndarray::concatenate(Axis(0), &views).ok();
            };
            let longest = arrays.iter().filter_map(|array| array.shape().get(axis));
            let longest = *longest.max()?;
            let padded: Vec<ArrayD<T>> = arrays
                .iter()
                .map(|array| {
                    let mut shape = array.shape().to_vec();
                    *shape.get_mut(axis)? = longest;
                    let mut padded = ArrayD::default(shape);
                    let own = Slice::from(..*array.shape().get(axis)?);
                    padded.slice_axis_mut(Axis(axis), own).assign(array);
                    Some(padded)
                })
                .collect::<Option<_>>()?;
            let views: Vec<_> = padded.iter().map(|array| array.view()).collect();
            ndarray::concatenate(Axis(0), &views).ok()
        }
        macro_rules! all {
            ($variant:ident) => {{
                let arrays = values.iter().map(|value| match value {
                    Self::$variant(array) => Some(array),
                    _ => None,
                });
                let arrays = arrays.collect::<Option<Vec<_>>>()?;
                join(&arrays, token_axis).map(Self::$variant)
            }};
        }
        match values.first()? {
            Self::Floats(_) => all!(Floats),
            Self::Integers(_) => all!(Integers),
            Self::Booleans(_) => all!(Booleans),
        }
    }
}

/// What a family's decoder takes besides embeddings, attention mask and positions.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderInput {
    /// Name and numbers; axis 0 is the batch, of 1.
    pub tensor: NamedTensor,
    /// The axis that runs over the prompt's tokens, where one does. When an answer is generated, a new
    /// token is given the last entry along it, and a tensor without such an axis whole.
    pub token_axis: Option<usize>,
    /// Whether a decoder that does not ask for it would compute something else for this sample than it
    /// does when it answers: such a decoder is refused.
    pub required: bool,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use ndarray::{Array2, Array3, array};

    use super::*;

    #[test]
    fn leading_axes_of_one_come_and_go_and_no_others() {
        let tensor = NamedTensor::floats("pixel_values", Array3::zeros((1, 2, 3)));
        assert_eq!(tensor.value.with_rank(5).shape(), [1, 1, 1, 2, 3]);
        assert_eq!(tensor.value.with_rank(2).shape(), [2, 3]);
        assert_eq!(tensor.value.with_rank(1).shape(), [2, 3]);
    }

    #[test]
    fn the_last_entry_along_an_axis_keeps_the_axis() {
        let tensor = TensorValue::Integers(array![[[1, 2], [3, 4]]].into_dyn());
        let last = TensorValue::Integers(array![[[3, 4]]].into_dyn());
        assert_eq!(tensor.last(1), last);
        assert_eq!(tensor.last(7), tensor);
    }

    #[test]
    fn a_batch_is_padded_along_the_tokens_and_must_fit_elsewhere() {
        let short = TensorValue::Integers(array![[1, 1]].into_dyn());
        let long = TensorValue::Integers(array![[2, 2, 2]].into_dyn());
        let both = TensorValue::Integers(array![[1, 1, 0], [2, 2, 2]].into_dyn());
        assert_eq!(TensorValue::stack(&[&short, &long], Some(1)).unwrap(), both);
        assert_eq!(TensorValue::stack(&[&short, &long], None), None);
        assert_eq!(TensorValue::stack(&[&short, &long], Some(5)), None);
        let floats = TensorValue::Floats(Array2::zeros((1, 2)).into_dyn());
        assert_eq!(TensorValue::stack(&[&short, &floats], Some(1)), None);
        assert_eq!(TensorValue::stack(&[], None), None);
    }
}
