//! What the model still says, and what it still knows, in numbers.

pub mod text;
