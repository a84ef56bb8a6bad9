//! Between ndarray and the runtime's values.

use half::{bf16, f16};
use ndarray::{ArrayD, ArrayViewD};
use ort::session::SessionInputValue;
use ort::value::{DynValue, Outlet, Tensor, TensorElementType, ValueType};

use crate::preprocess::TensorValue;

/// Name, element type and dimensions (-1: dynamic) of a session's input or output.
#[derive(Clone, Debug)]
pub(super) struct Port {
    pub(super) name: String,
    pub(super) element: TensorElementType,
    pub(super) dims: Vec<i64>,
}

impl Port {
    /// The port of an outlet, or `None` where it is no tensor.
    pub(super) fn of(outlet: &Outlet) -> Option<Port> {
        match outlet.dtype() {
            ValueType::Tensor {
                ty,
                shape,
                dimension_symbols,
            } => {
                // Some exporters write a size where others have a dimension's name.
                let written = dimension_symbols.iter().map(|symbol| symbol.parse().ok());
                let dims = shape.iter().zip(written);
                let dims = dims.map(|(&dim, written)| match written {
                    Some(size) if dim < 0 && size > 0 => size,
                    _ => dim,
                });
                Some(Port {
                    name: outlet.name().to_owned(),
                    element: *ty,
                    dims: dims.collect(),
                })
            }
            _ => None,
        }
    }

    /// A value for this input from float32 numbers, in the input's own type.
    pub(super) fn floats(
        &self,
        array: ArrayViewD<'_, f32>,
    ) -> Result<SessionInputValue<'static>, ort::Error> {
        let shape = array.shape().to_vec();
        Ok(match self.element {
            TensorElementType::Float16 => {
                let data: Vec<f16> = array.iter().map(|&value| f16::from_f32(value)).collect();
                Tensor::from_array((shape, data))?.into()
            }
            TensorElementType::Bfloat16 => {
                let data: Vec<bf16> = array.iter().map(|&value| bf16::from_f32(value)).collect();
                Tensor::from_array((shape, data))?.into()
            }
            _ => Tensor::from_array((shape, array.iter().copied().collect::<Vec<f32>>()))?.into(),
        })
    }

    /// A value for this input from a family's tensor, in the input's own type and, as far as axes of
    /// length 1 allow, rank.
    pub(super) fn value(
        &self,
        tensor: &TensorValue,
    ) -> Result<SessionInputValue<'static>, ort::Error> {
        let tensor = tensor.with_rank(self.dims.len());
        let shape = tensor.shape().to_vec();
        Ok(match (&tensor, self.element) {
            (TensorValue::Floats(array), _) => self.floats(array.view())?,
            (TensorValue::Integers(array), TensorElementType::Int32) => {
                let data = array.iter().map(|&value| i32::try_from(value));
                let data: Vec<i32> = data
                    .collect::<Result<_, _>>()
                    .map_err(|error| ort::Error::new(format!("{}: {error}", self.name)))?;
                Tensor::from_array((shape, data))?.into()
            }
            (TensorValue::Integers(array), _) => int64s(shape, array.iter().copied().collect())?,
            (TensorValue::Booleans(array), TensorElementType::Int64) => {
                int64s(shape, array.iter().map(|&on| i64::from(on)).collect())?
            }
            (TensorValue::Booleans(array), _) => {
                Tensor::from_array((shape, array.iter().copied().collect::<Vec<bool>>()))?.into()
            }
        })
    }

    /// Whether a tensor fits this input: in kind, rank and the dimensions that the graph states.
    pub(super) fn takes(&self, tensor: &TensorValue) -> bool {
        use TensorElementType as Element;
        let kinds: &[Element] = match tensor {
            TensorValue::Floats(_) => &[Element::Float32, Element::Float16, Element::Bfloat16],
            TensorValue::Integers(_) => &[Element::Int64, Element::Int32],
            TensorValue::Booleans(_) => &[Element::Bool, Element::Int64],
        };
        let kind = kinds.contains(&self.element);
        let tensor = tensor.with_rank(self.dims.len());
        let shape = tensor.shape();
        let same = |(&open, &size): (&i64, &usize)| open <= 0 || usize::try_from(open) == Ok(size);
        kind && shape.len() == self.dims.len() && self.dims.iter().zip(shape).all(same)
    }

    /// A value of zeros for this input; of nothing where `shape` has a 0.
    pub(super) fn zeros(&self, shape: &[usize]) -> Result<SessionInputValue<'static>, ort::Error> {
        self.floats(ArrayD::zeros(shape).view())
    }
}

/// A value of one truth, `[1]`.
pub(super) fn boolean(value: bool) -> Result<SessionInputValue<'static>, ort::Error> {
    Ok(Tensor::from_array(([1usize], vec![value]))?.into())
}

/// An int64 value.
pub(super) fn int64s(
    shape: Vec<usize>,
    data: Vec<i64>,
) -> Result<SessionInputValue<'static>, ort::Error> {
    Ok(Tensor::from_array((shape, data))?.into())
}

/// A shape, and the numbers in it.
pub(super) type Floats = (Vec<usize>, Vec<f32>);

/// The shape and float32 numbers of an output, whatever float type it has.
pub(super) fn to_floats(value: &DynValue) -> Result<Floats, ort::Error> {
    let dims = |shape: &[i64]| {
        shape
            .iter()
            .map(|&dim| usize::try_from(dim).unwrap_or(0))
            .collect()
    };
    if let Ok((shape, data)) = value.try_extract_tensor::<f16>() {
        return Ok((
            dims(shape),
            data.iter().map(|value| value.to_f32()).collect(),
        ));
    }
    if let Ok((shape, data)) = value.try_extract_tensor::<bf16>() {
        return Ok((
            dims(shape),
            data.iter().map(|value| value.to_f32()).collect(),
        ));
    }
    let (shape, data) = value.try_extract_tensor::<f32>()?;
    Ok((dims(shape), data.to_vec()))
}
