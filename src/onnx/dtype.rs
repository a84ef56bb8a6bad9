//! Element types of tensors.

use super::schema::tensor_proto::DataType as Code;

/// The element type of a tensor (`TensorProto.DataType` in ONNX's schema), by the names that
/// ONNX's documentation uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DataType(Code);

impl DataType {
    /// 32-bit IEEE 754.
    pub const FLOAT: DataType = DataType(Code::Float);
    /// 16-bit IEEE 754.
    pub const FLOAT16: DataType = DataType(Code::Float16);
    /// bfloat16: the upper half of a 32-bit float.
    pub const BFLOAT16: DataType = DataType(Code::Bfloat16);
    /// 64-bit signed integer.
    pub const INT64: DataType = DataType(Code::Int64);
    /// 32-bit signed integer.
    pub const INT32: DataType = DataType(Code::Int32);
    /// Boolean, one byte each.
    pub const BOOL: DataType = DataType(Code::Bool);

    /// The type of an ONNX type code, or `None` for `UNDEFINED` and codes that the schema lacks.
    pub fn from_code(code: i32) -> Option<DataType> {
        match Code::try_from(code) {
            Ok(Code::Undefined) | Err(_) => None,
            Ok(code) => Some(DataType(code)),
        }
    }

    /// The ONNX type code, as `TensorProto.data_type` and `Cast.to` hold it.
    pub fn code(self) -> i32 {
        self.0 as i32
    }

    /// Bits per element; `None` for strings, which have no fixed size.
    pub fn bits(self) -> Option<u64> {
        Some(match self.0 {
            Code::Undefined | Code::String => return None,
            Code::Uint2 | Code::Int2 => 2,
            Code::Uint4 | Code::Int4 | Code::Float4e2m1 => 4,
            Code::Uint8
            | Code::Int8
            | Code::Bool
            | Code::Float8e4m3fn
            | Code::Float8e4m3fnuz
            | Code::Float8e5m2
            | Code::Float8e5m2fnuz
            | Code::Float8e8m0 => 8,
            Code::Float6e2m3 | Code::Float6e3m2 => 6,
            Code::Uint16 | Code::Int16 | Code::Float16 | Code::Bfloat16 => 16,
            Code::Float | Code::Int32 | Code::Uint32 => 32,
            Code::Double | Code::Int64 | Code::Uint64 | Code::Complex64 => 64,
            Code::Complex128 => 128,
        })
    }

    /// Bytes that `elements` of this type take (sub-byte types are packed, the last byte padded),
    /// or `None` where that does not fit in 64 bits or the type has no fixed size.
    pub fn bytes(self, elements: u64) -> Option<u64> {
        elements
            .checked_mul(self.bits()?)
            .map(|bits| bits.div_ceil(8))
    }

    /// Whether codes of this integer type are signed.
    pub fn is_signed(self) -> bool {
        matches!(
            self.0,
            Code::Int2 | Code::Int4 | Code::Int8 | Code::Int16 | Code::Int32 | Code::Int64
        )
    }

    /// Whether weights of this type can be scaled in place: float32, float16, bfloat16.
    pub fn is_scalable_float(self) -> bool {
        matches!(self.0, Code::Float | Code::Float16 | Code::Bfloat16)
    }

    /// Whether quantized weights of this type are codes of a linear scale: integers of 2, 4 or 8 bits.
    pub fn is_quantized_integer(self) -> bool {
        matches!(
            self.0,
            Code::Int2 | Code::Uint2 | Code::Int4 | Code::Uint4 | Code::Int8 | Code::Uint8
        )
    }
}

impl std::fmt::Display for DataType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.as_str_name().to_ascii_lowercase())
    }
}

impl serde::Serialize for DataType {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for DataType {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        match Code::from_str_name(&name.to_ascii_uppercase()) {
            Some(code) if code != Code::Undefined => Ok(DataType(code)),
            _ => Err(serde::de::Error::custom(format_args!(
                "'{name}' is no element type of ONNX"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::DataType;

    #[test]
    fn sizes_are_those_of_the_onnx_schema() {
        assert_eq!(DataType::FLOAT.bytes(3), Some(12));
        assert_eq!(DataType::FLOAT16.bytes(3), Some(6));
        // UINT4 = 21: two elements a byte, the last one padded.
        assert_eq!(DataType::from_code(21).unwrap().bytes(3), Some(2));
        assert_eq!(
            DataType::from_code(8).unwrap().bytes(3),
            None,
            "strings have no size"
        );
        assert_eq!(DataType::FLOAT.bytes(u64::MAX), None);
        assert_eq!(DataType::from_code(0), None);
        assert_eq!(DataType::from_code(999), None);
    }

    #[test]
    fn names_are_onnx_names() {
        assert_eq!(DataType::BFLOAT16.to_string(), "bfloat16");
        assert_eq!(DataType::FLOAT.to_string(), "float");
    }
}
