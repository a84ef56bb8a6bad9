//! Stored values times gates, each product rounded once.
//!
//! In: a block of a stored matrix (float32, float16, bfloat16, little-endian) and the gates along one
//! of its axes. Out: the same block, scaled. The result is the stored type's value nearest to the
//! exact product, ties to even; elements whose gate is 1 keep their bits, whatever they are, and those whose
//! gate is 0 become positive zero, whatever their sign was.
//!
//! float32: one IEEE multiplication rounds the exact product. float16 and bfloat16: the product (at
//! most 11 + 24 significant bits) is exact in float64; going from there to 16 bits by way of float32
//! would round twice, so the step to float32 rounds *to odd*, which leaves the last step right
//! (Boldo, Melquiond 2008: 24 ≥ 11 + 2 bits). Most products need none of that: see `scale_halves`.

use crate::onnx::DataType;

/// Where a product is not finite.
pub(super) struct NotFinite {
    /// Position in the block.
    pub(super) index: usize,
    /// The stored value.
    pub(super) found: f32,
    /// The gate.
    pub(super) gate: f32,
}

/// A piece of a stored matrix, in memory aligned for its elements.
pub(super) struct Block {
    words: Vec<u32>,
    len: usize,
}

impl Block {
    /// Room for `bytes` bytes.
    pub(super) fn with_capacity(bytes: usize) -> Block {
        Block {
            words: vec![0; bytes.div_ceil(4)],
            len: 0,
        }
    }

    /// Makes room for `bytes` bytes.
    pub(super) fn reserve(&mut self, bytes: usize) {
        if self.words.len() * 4 < bytes {
            self.words.resize(bytes.div_ceil(4), 0);
        }
    }

    /// The first `len` bytes, to be filled.
    pub(super) fn resized(&mut self, len: usize) -> &mut [u8] {
        self.len = len.min(self.words.len() * 4);
        self.bytes_mut()
    }

    pub(super) fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.words)
            .get(..self.len)
            .unwrap_or_default()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.words)
            .get_mut(..self.len)
            .unwrap_or_default()
    }

    /// The elements as 32-bit values. Aligned, as the words are.
    fn singles(&mut self) -> &mut [f32] {
        let len = self.len / 4;
        bytemuck::cast_slice_mut(&mut self.words)
            .get_mut(..len)
            .unwrap_or_default()
    }

    fn halves(&mut self) -> &mut [u16] {
        let len = self.len / 2;
        bytemuck::cast_slice_mut(&mut self.words)
            .get_mut(..len)
            .unwrap_or_default()
    }

    /// Element `index`, widened to float32.
    pub(super) fn value(&self, dtype: DataType, index: usize) -> Option<f32> {
        let half = || {
            let halves: &[u16] = bytemuck::cast_slice(&self.words);
            halves.get(..self.len / 2)?.get(index).copied()
        };
        match dtype {
            DataType::FLOAT => {
                let singles: &[f32] = bytemuck::cast_slice(&self.words);
                singles.get(..self.len / 4)?.get(index).copied()
            }
            DataType::FLOAT16 => half().map(Float16::widen),
            _ => half().map(BFloat16::widen),
        }
    }

    /// The elements, widened to float32.
    pub(super) fn widened(&mut self, dtype: DataType, mut each: impl FnMut(usize, f32)) {
        match dtype {
            DataType::FLOAT => self
                .singles()
                .iter()
                .enumerate()
                .for_each(|(i, &v)| each(i, v)),
            DataType::FLOAT16 => {
                (self.halves().iter().enumerate()).for_each(|(i, &h)| each(i, Float16::widen(h)));
            }
            _ => (self.halves().iter().enumerate()).for_each(|(i, &h)| each(i, BFloat16::widen(h))),
        }
    }
}

/// Gates along one axis of a stored matrix.
#[derive(Clone, Copy)]
pub(super) struct Scaling<'g> {
    /// Element type of the matrix: float32, float16 or bfloat16.
    pub(super) dtype: DataType,
    /// Stored columns.
    pub(super) columns: usize,
    /// The axis along which the gates run: 0, or else 1.
    pub(super) axis: usize,
    /// One gate for each slice along the axis.
    pub(super) gates: &'g [f32],
}

impl Scaling<'_> {
    /// Scales `block`, which begins at the stored element `start`. False: every gate in it is 1, and
    /// nothing was touched.
    pub(super) fn apply(&self, start: usize, block: &mut Block) -> Result<bool, NotFinite> {
        match self.dtype {
            DataType::FLOAT => self.runs(start, block.singles(), scale_singles),
            DataType::FLOAT16 => self.runs(start, block.halves(), scale_halves::<Float16>),
            _ => self.runs(start, block.halves(), scale_halves::<BFloat16>),
        }
    }

    /// Cuts the block into rows, and hands each to `scale` with its gates.
    fn runs<T: Copy + Default>(
        &self,
        start: usize,
        mut values: &mut [T],
        scale: fn(&mut [T], Gates<'_>) -> Result<(), NotFinite>,
    ) -> Result<bool, NotFinite> {
        if self.columns == 0 {
            return Ok(false);
        }
        let (mut row, mut column) = (start / self.columns, start % self.columns);
        let mut touched = false;
        let mut done = 0;
        while !values.is_empty() {
            let len = (self.columns - column).min(values.len());
            let (run, rest) = values.split_at_mut(len);
            let gates = match self.axis {
                0 => Gates::One(self.gates.get(row).copied().unwrap_or(1.0)),
                _ => Gates::Each(self.gates.get(column..column + len).unwrap_or_default()),
            };
            if !gates.are_one() {
                touched = true;
                scale(run, gates).map_err(|fault| NotFinite {
                    index: fault.index + done,
                    ..fault
                })?;
                erase(run, gates);
            }
            values = rest;
            done += len;
            (row, column) = (row + 1, 0);
        }
        Ok(touched)
    }
}

/// The gates of one run of values.
#[derive(Clone, Copy)]
enum Gates<'g> {
    /// One for all.
    One(f32),
    /// One for each.
    Each(&'g [f32]),
}

impl Gates<'_> {
    #[allow(clippy::float_cmp)] // Exactly 1 is what leaves every bit alone.
    fn are_one(self) -> bool {
        match self {
            Gates::One(gate) => gate == 1.0,
            Gates::Each(gates) => gates.iter().all(|&gate| gate == 1.0),
        }
    }
}

/// Writes positive zero where the gate is 0: a product would keep the value's sign, and the signs of a knowledge vector
/// tell much of it.
#[allow(clippy::float_cmp)] // Exactly 0 is what destroys.
fn erase<T: Copy + Default>(values: &mut [T], gates: Gates<'_>) {
    match gates {
        Gates::One(0.0) => values.fill(T::default()),
        Gates::One(_) => {}
        Gates::Each(gates) => {
            for (value, _) in values
                .iter_mut()
                .zip(gates)
                .filter(|(_, gate)| **gate == 0.0)
            {
                *value = T::default();
            }
        }
    }
}

/// The exponent of infinities and NaN, all ones.
const SINGLE_EXPONENT: u32 = 0x7f80_0000;

/// Scales every value by its gate with `one`, which returns the new value and whether it is not
/// finite. A faulty element keeps its value; the first one is the error. No early way out, so that
/// the loops vectorize.
#[allow(clippy::float_cmp)] // Exactly 1 is what leaves every bit alone.
#[inline(always)]
fn each<T: Copy>(
    values: &mut [T],
    gates: Gates<'_>,
    one: impl Fn(T, f32) -> (T, bool),
    widen: impl Fn(T) -> f32,
) -> Result<(), NotFinite> {
    let mut first = u32::MAX;
    match gates {
        Gates::One(gate) => {
            for (index, value) in (0u32..).zip(values.iter_mut()) {
                let (product, fault) = one(*value, gate);
                first = first.min(if fault { index } else { u32::MAX });
                *value = if fault { *value } else { product };
            }
        }
        Gates::Each(gates) => {
            for (index, (value, &gate)) in (0u32..).zip(values.iter_mut().zip(gates)) {
                let (product, fault) = one(*value, gate);
                let fault = fault && gate != 1.0;
                first = first.min(if fault { index } else { u32::MAX });
                *value = if fault || gate == 1.0 {
                    *value
                } else {
                    product
                };
            }
        }
    }
    // A block is a few megabytes: its positions fit.
    let index = usize::try_from(first).unwrap_or(usize::MAX);
    match values.get(index) {
        Some(&value) => Err(NotFinite {
            index,
            found: widen(value),
            gate: match gates {
                Gates::One(gate) => gate,
                Gates::Each(gates) => gates.get(index).copied().unwrap_or(1.0),
            },
        }),
        None => Ok(()),
    }
}

fn scale_singles(values: &mut [f32], gates: Gates<'_>) -> Result<(), NotFinite> {
    let one = |value: f32, gate: f32| {
        let product = value * gate;
        (
            product,
            product.to_bits() & SINGLE_EXPONENT == SINGLE_EXPONENT,
        )
    };
    each(values, gates, one, |value| value)
}

/// Elements that are scaled by the same path.
const RUN: usize = 64;

/// By way of one float32 product where that cannot round twice: a product that float32 did not round
/// onto the middle of two 16-bit values lies on the same side of it as the exact one.
fn scale_halves<F: Half>(values: &mut [u16], gates: Gates<'_>) -> Result<(), NotFinite> {
    let exact = |value: u16, gate: f32| {
        let product = f64::from(F::widen(value)) * f64::from(gate);
        faulty::<F>(value, F::narrow(round_to_odd(product)))
    };
    let short = |value: u16, gate: f32| faulty::<F>(value, F::narrow(F::widen(value) * gate));
    for (run, values) in values.chunks_mut(RUN).enumerate() {
        let gates = match gates {
            Gates::One(gate) => Gates::One(gate),
            Gates::Each(all) => {
                let start = run * RUN;
                Gates::Each(all.get(start..start + values.len()).unwrap_or_default())
            }
        };
        let doubtful = |value: u16, gate: f32| F::is_doubtful(F::widen(value) * gate);
        let any = match gates {
            Gates::One(gate) => values.iter().fold(false, |any, &v| any | doubtful(v, gate)),
            Gates::Each(gates) => {
                (values.iter().zip(gates)).fold(false, |any, (&v, &gate)| any | doubtful(v, gate))
            }
        };
        let scaled = match any {
            true => each(values, gates, exact, F::widen),
            false => each(values, gates, short, F::widen),
        };
        scaled.map_err(|fault| NotFinite {
            index: fault.index + run * RUN,
            ..fault
        })?;
    }
    Ok(())
}

/// The product, and whether it or the value is not finite.
#[inline(always)]
fn faulty<F: Half>(value: u16, product: u16) -> (u16, bool) {
    let finite = value & F::EXPONENT != F::EXPONENT && product & F::EXPONENT != F::EXPONENT;
    (product, !finite)
}

/// A float of 16 bits.
trait Half {
    /// The exponent of infinities and NaN, all ones.
    const EXPONENT: u16;
    /// The same value in 32 bits, where it is finite.
    fn widen(half: u16) -> f32;
    /// The nearest value of 16 bits, ties to even.
    fn narrow(single: f32) -> u16;
    /// Whether a rounded product may lie in the middle of two values of 16 bits.
    fn is_doubtful(single: f32) -> bool;
}

struct Float16;

impl Half for Float16 {
    const EXPONENT: u16 = 0x7c00;

    #[inline(always)]
    fn widen(half: u16) -> f32 {
        // Exponents are 112 apart; a multiplication by 2^112 also normalizes subnormals.
        const TWO_TO_112: f32 = f32::from_bits((127 + 112) << 23);
        let magnitude = f32::from_bits(u32::from(half & 0x7fff) << 13) * TWO_TO_112;
        let infinite = half & Self::EXPONENT == Self::EXPONENT;
        let bits = match infinite {
            true => SINGLE_EXPONENT | u32::from(half & 0x3ff) << 13,
            false => magnitude.to_bits(),
        };
        f32::from_bits(bits | u32::from(half & 0x8000) << 16)
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation)] // Every result fits: the magnitude is at most 0x7c00.
    fn narrow(single: f32) -> u16 {
        let sign = (single.to_bits() >> 16) & 0x8000;
        let magnitude = single.to_bits() & 0x7fff_ffff;
        // 2^-14 is the least normal float16. Below, adding 0.5 rounds to its last place, 2^-24.
        let subnormal = (f32::from_bits(magnitude) + 0.5)
            .to_bits()
            .wrapping_sub(0x3f00_0000);
        let odd = (magnitude >> 13) & 1;
        let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0xfff + odd) >> 13;
        let bits = match magnitude < 0x3880_0000 {
            true => subnormal,
            false => normal.min(0x7c00),
        };
        (bits | sign) as u16
    }

    #[inline(always)]
    fn is_doubtful(single: f32) -> bool {
        let magnitude = single.to_bits() & 0x7fff_ffff;
        // Subnormals are rarer than it would pay to tell their middles.
        let subnormal = magnitude.wrapping_sub(1) < 0x3880_0000 - 1;
        (magnitude & 0x1fff == 0x1000) | subnormal
    }
}

struct BFloat16;

impl Half for BFloat16 {
    const EXPONENT: u16 = 0x7f80;

    #[inline(always)]
    fn widen(half: u16) -> f32 {
        f32::from_bits(u32::from(half) << 16)
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation)] // The upper half of 32 bits.
    fn narrow(single: f32) -> u16 {
        let bits = single.to_bits();
        (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16
    }

    #[inline(always)]
    fn is_doubtful(single: f32) -> bool {
        single.to_bits() & 0xffff == 0x8000
    }
}

/// The float32 on either side of `exact` whose last bit is 1, or `exact` where it is a float32.
#[inline(always)]
#[allow(clippy::cast_possible_truncation)] // The rounding of this very cast is undone below.
#[allow(clippy::float_cmp)] // Whether the cast was exact.
fn round_to_odd(exact: f64) -> f32 {
    let nearest = exact as f32;
    let back = f64::from(nearest);
    let away = u32::from(back.abs() > exact.abs());
    let inexact = u32::from(back != exact);
    f32::from_bits((nearest.to_bits() - away) | inexact)
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests {
    use super::*;

    /// Nearest value of `all` (ascending finite magnitudes) to `exact`, ties to the even encoding.
    fn nearest(all: &[f64], exact: f64) -> usize {
        let magnitude = exact.abs();
        let above = all.partition_point(|&v| v < magnitude).min(all.len() - 1);
        let below = above.saturating_sub(1);
        let (up, down) = (
            (all[above] - magnitude).abs(),
            (magnitude - all[below]).abs(),
        );
        match up.partial_cmp(&down).unwrap() {
            std::cmp::Ordering::Less => above,
            std::cmp::Ordering::Greater => below,
            std::cmp::Ordering::Equal if above.is_multiple_of(2) => above,
            std::cmp::Ordering::Equal => below,
        }
    }

    fn every_half_times_many_gates<F: Half>(dtype: DataType, reference: fn(u16) -> f64) {
        let magnitudes: Vec<f64> = (0..F::EXPONENT).map(reference).collect();
        let mut gates = vec![
            0.5,
            0.25,
            0.75,
            1.0 / 3.0,
            0.999_999_94,
            1e-3,
            1e-8,
            0.0,
            -0.7,
            1.5,
        ];
        // Gates with all 24 bits, and with few: those make ties.
        gates.extend((0..64).map(|k| f32::from_bits(0x3f00_0000 | (k * 0x0001_f3a7) & 0x7f_ffff)));
        gates.extend((0..32u8).map(|k| 1.0 - f32::from(k) / 64.0));
        for gate in gates {
            let fits = |&half: &u16| {
                (reference(half) * f64::from(gate)).abs() <= *magnitudes.last().unwrap()
            };
            let halves: Vec<u16> = (0..F::EXPONENT)
                .step_by(7)
                .chain(0..2100)
                .filter(fits)
                .collect();
            let mut block = Block::with_capacity(halves.len() * 2);
            block
                .resized(halves.len() * 2)
                .copy_from_slice(bytemuck::cast_slice(&halves));
            let scaling = Scaling {
                dtype,
                columns: halves.len(),
                axis: 0,
                gates: &[gate],
            };
            assert!(scaling.apply(0, &mut block).is_ok());
            for (&half, &got) in halves.iter().zip(block.halves().iter()) {
                let exact = reference(half) * f64::from(gate);
                let expected = nearest(&magnitudes, exact) as u16;
                assert_eq!(got & 0x7fff, expected, "{half:#x} × {gate}");
            }
        }
    }

    #[test]
    fn float16_products_are_rounded_to_nearest_even_subnormals_included() {
        every_half_times_many_gates::<Float16>(DataType::FLOAT16, |h| {
            half::f16::from_bits(h).to_f64()
        });
    }

    #[test]
    fn bfloat16_products_are_rounded_to_nearest_even_subnormals_included() {
        every_half_times_many_gates::<BFloat16>(DataType::BFLOAT16, |h| {
            half::bf16::from_bits(h).to_f64()
        });
    }

    #[test]
    fn widening_is_exact_for_every_value_of_16_bits() {
        for bits in 0..=u16::MAX {
            let (a, b) = (Float16::widen(bits), half::f16::from_bits(bits).to_f32());
            assert!(
                a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()),
                "{bits:#x}"
            );
        }
    }

    #[test]
    fn rounding_twice_would_be_wrong_here() {
        // 1 + 2^-11 + 2^-25: float32 rounds it to the tie 1 + 2^-11, and that goes to even, 1.
        let exact = 1.0 + 2f64.powi(-11) + 2f64.powi(-25);
        assert_eq!(half::f16::from_f32(exact as f32).to_bits(), 0x3c00);
        assert_eq!(Float16::narrow(round_to_odd(exact)), 0x3c01);
    }

    #[test]
    fn a_gate_of_0_leaves_no_sign_behind() {
        let mut block = Block::with_capacity(8);
        let values: [f32; 2] = [-3.0, -0.0];
        for (axis, gates) in [(0, [0.0, 0.0]), (1, [0.0, -0.0])] {
            (block.resized(8)).copy_from_slice(bytemuck::cast_slice(&values));
            let scaling = Scaling {
                dtype: DataType::FLOAT,
                columns: 2,
                axis,
                gates: &gates,
            };
            assert!(scaling.apply(0, &mut block).is_ok());
            assert_eq!(block.bytes(), [0; 8]);
        }
    }

    #[test]
    fn an_overflow_is_found_where_it_is() {
        let mut block = Block::with_capacity(8);
        let values: [u16; 4] = [0x3c00, 0x7bff, 0x3c00, 0x7bff];
        block
            .resized(8)
            .copy_from_slice(bytemuck::cast_slice(&values));
        let scaling = Scaling {
            dtype: DataType::FLOAT16,
            columns: 2,
            axis: 0,
            gates: &[1.0, 2.0],
        };
        let fault = scaling.apply(0, &mut block).err().unwrap();
        assert_eq!((fault.index, fault.gate), (3, 2.0));
    }

    #[test]
    fn a_signalling_nan_under_a_gate_of_1_keeps_its_bits() {
        let mut block = Block::with_capacity(8);
        let values: [u32; 2] = [0x7f80_0001, 0x3f80_0000];
        block
            .resized(8)
            .copy_from_slice(bytemuck::cast_slice(&values));
        let scaling = Scaling {
            dtype: DataType::FLOAT,
            columns: 2,
            axis: 1,
            gates: &[1.0, 0.5],
        };
        assert!(scaling.apply(0, &mut block).is_ok());
        assert_eq!(
            block.bytes(),
            bytemuck::cast_slice::<u32, u8>(&[0x7f80_0001, 0x3f00_0000])
        );
    }
}
