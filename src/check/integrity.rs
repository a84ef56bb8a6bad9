//! Do the files hold what the receipt says, every decoder, and nothing else?
//!
//! In: the folder's files and receipt, and the original where it is at hand. Out: checks added to a
//! [`Verdict`]. Every statement rests on digests of bytes that were read now.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::{Code, Error, Finding, Policy, Subject, Verdict};
use crate::bundle::{Bundle, OnnxFile, Role, Tree, beside};
use crate::edit::{self, RangeState, Receipt, RecheckedFile, diff, recheck, recheck_original};
use crate::files::RECEIPT;
use crate::graph::{LayerId, Tower};
use crate::onnx::{ByteSpan, Limits, ModelFile, Storage, tensors};

/// Checks everything about the folder's bytes. Returns its receipt, if it has one.
pub(super) fn check(
    verdict: &mut Verdict,
    bundle: &Bundle,
    subject: &Subject<'_>,
    policy: &Policy,
) -> Result<Option<Receipt>, Error> {
    let Some(receipt) = receipt(verdict, bundle.tree(), policy) else {
        return Ok(None);
    };
    let files = recheck(bundle.tree(), &receipt)?;
    ranges(verdict, &files, policy);
    decoders(verdict, bundle, &receipt, policy)?;
    match subject.original {
        Some(original) => against_original(verdict, subject, original, &receipt, policy)?,
        None => without_original(verdict, bundle.tree(), &files, policy),
    }
    Ok(Some(receipt))
}

/// Whether there is a receipt of this tool, and of a version that may be relied on.
fn receipt(verdict: &mut Verdict, tree: &Tree, policy: &Policy) -> Option<Receipt> {
    let (receipt, finding) = match Receipt::of(tree) {
        Ok(Some(receipt)) => (Some(receipt), None),
        Ok(None) => {
            let message = format!("no {RECEIPT}: nothing was unlearned here by kvw");
            (None, Some(Finding::new(Code::ReceiptMissing, message)))
        }
        Err(error) => {
            let why = std::error::Error::source(&error)
                .map_or_else(String::new, |source| format!(": {source}"));
            let message = format!("{error}{why}");
            (None, Some(Finding::new(Code::ReceiptInvalid, message)))
        }
    };
    let summary = match &receipt {
        Some(receipt) => format!(
            "written by {} {}, plan {:.12}",
            receipt.tool,
            receipt.version,
            receipt.plan_digest.to_string()
        ),
        None => "none that can be read".to_owned(),
    };
    let findings = finding.map(|finding| finding.in_file(RECEIPT));
    verdict.add(
        policy,
        "receipt",
        summary,
        findings.into_iter().collect(),
        None,
    );
    let receipt = receipt?;
    if let Some(least) = &policy.min_version {
        let found = semver::Version::parse(&receipt.version);
        let finding = match &found {
            Ok(found) if found >= least && receipt.tool == "kvw" => None,
            _ => Some(Finding::new(
                Code::ToolVersion,
                format!(
                    "expected kvw {least} or newer, found {} {}",
                    receipt.tool, receipt.version
                ),
            )),
        };
        let summary = format!("kvw {least} or newer is allowed");
        verdict.add(policy, "tool", summary, finding.into_iter().collect(), None);
    }
    if receipt.previous.is_some() {
        let edits = std::iter::successors(Some(&receipt), |r| r.previous.as_deref()).count();
        let message = format!("{edits} edits, of which the last is checked here");
        let finding = Finding::new(Code::EditedRepeatedly, message).in_file(RECEIPT);
        verdict.add(
            policy,
            "history",
            format!("{edits} edits"),
            vec![finding],
            None,
        );
    }
    Some(receipt)
}

/// Whether every planned range holds what was written there.
fn ranges(verdict: &mut Verdict, files: &[RecheckedFile<'_>], policy: &Policy) {
    let mut findings = Vec::new();
    let mut changed = 0usize;
    let mut count = 0usize;
    for RecheckedFile {
        file,
        len,
        ranges,
        inserted,
        ..
    } in files
    {
        let path = file.path.as_str();
        match len {
            None => {
                let message = format!("{path}: the receipt names it, but it is not there");
                findings.push(Finding::new(Code::FileMissing, message).in_file(path));
            }
            Some(len) if *len != file.bytes => {
                let message = format!("{path}: expected {} bytes, found {len}", file.bytes);
                findings.push(Finding::new(Code::FileLength, message).in_file(path));
            }
            Some(_) => {}
        }
        count += file.inserted.len();
        changed += file.inserted.len();
        if len.is_some() && *inserted != file.inserted.len() {
            let message = format!(
                "{path}: {} of {} inserted into the graph are not as they were written",
                file.inserted.len() - inserted,
                counted(file.inserted.len(), "range")
            );
            findings.push(Finding::new(Code::RangeAltered, message).in_file(path));
        }
        for (range, state) in ranges {
            count += 1;
            changed += usize::from(range.sha256_before != range.sha256_after);
            let what = format!("{path}: layer {}, '{}'", range.layer, range.tensor);
            let (code, found) = match state {
                RangeState::Written => continue,
                RangeState::Untouched => (Code::RangeNotEdited, "still as in the original"),
                RangeState::Altered => (
                    Code::RangeAltered,
                    "neither as in the original nor as it was written",
                ),
                RangeState::Absent => (Code::RangeAltered, "beyond the end of the file"),
            };
            findings.push(Finding::new(code, format!("{what}: {found}")).in_file(path));
        }
    }
    if changed == 0 {
        let message = "the receipt names no range in which a byte changed";
        findings.push(Finding::new(Code::NothingEdited, message).in_file(RECEIPT));
    }
    let summary = format!(
        "{} in {} compared with the receipt's digests",
        counted(count, "planned range"),
        counted(files.len(), "file")
    );
    verdict.add(policy, "ranges", summary, findings, None);
}

/// Whether every decoder file of the folder was edited, in the same layers, and all variants are there. Where
/// layers of the vision encoder were, the same of every file of that.
fn decoders(
    verdict: &mut Verdict,
    bundle: &Bundle,
    receipt: &Receipt,
    policy: &Policy,
) -> Result<(), Error> {
    let mut findings = Vec::new();
    let of_edits = receipt.edits.iter().map(|edit| edit.layer);
    let of_ranges = receipt.files.iter().flat_map(|file| &file.ranges);
    let layers: BTreeSet<LayerId> = of_edits.chain(of_ranges.map(|range| range.layer)).collect();
    let mut count = 0;
    for file in bundle.files() {
        let layers: BTreeSet<LayerId> = layers
            .iter()
            .copied()
            .filter(|layer| match layer.tower() {
                Tower::Vision if bundle.has(Role::VisionEncoder) => {
                    file.role == Role::VisionEncoder
                }
                _ => file.role == Role::Decoder,
            })
            .collect();
        if layers.is_empty() {
            continue;
        }
        count += 1;
        let path = file.relative.as_str();
        let found = edited_layers(file, receipt)?;
        if found.is_empty() && file.role == Role::Decoder {
            let message = format!("{path}: the receipt has no edit of this decoder");
            findings.push(Finding::new(Code::DecoderNotEdited, message).in_file(path));
            continue;
        }
        for layer in layers.difference(&found) {
            let message = format!("{path}: layer {layer} was edited in another file, not here");
            findings.push(Finding::new(Code::LayerNotEdited, message).in_file(path));
        }
    }
    for wanted in &policy.variants {
        let name = match wanted.name.as_str() {
            "fp32" | "none" => "",
            name => name,
        };
        if !bundle.decoders().any(|decoder| decoder.variant == name) {
            let message = format!("no decoder of variant `{}`", wanted.name);
            findings.push(Finding::new(Code::VariantMissing, message).at_line(wanted.line));
        }
    }
    let summary = format!(
        "{} with {} edited",
        match bundle.has(Role::VisionEncoder)
            && layers.iter().any(|layer| layer.tower() == Tower::Vision)
        {
            true => counted(count, "model file"),
            false => counted(count, "decoder file"),
        },
        counted(layers.len(), "layer")
    );
    verdict.add(policy, "decoders", summary, findings, None);
    Ok(())
}

/// The layers of `decoder` that the receipt names: by ranges in the file itself or in the external data
/// of one of its tensors, or by a change of its graph.
fn edited_layers(decoder: &OnnxFile, receipt: &Receipt) -> Result<BTreeSet<LayerId>, Error> {
    let model = ModelFile::open(&decoder.path, &Limits::default()).map_err(edit::Error::from)?;
    let mut data: BTreeMap<String, Vec<ByteSpan>> = BTreeMap::new();
    for tensor in tensors(model.proto()) {
        let storage = model.storage(tensor).map_err(edit::Error::from)?;
        if let Storage::External { location, span, .. } = storage {
            let file = beside(&decoder.relative, &location);
            data.entry(file).or_default().push(span);
        }
    }
    let rewritten = |path: &str| {
        let mut files = receipt.files.iter();
        files.any(|file| file.path == path && !file.inserted.is_empty())
    };
    let edits = receipt.edits.iter();
    let mut layers: BTreeSet<LayerId> = edits
        .filter(|edit| edit.graph && edit.file == decoder.relative && rewritten(&edit.file))
        .map(|edit| edit.layer)
        .collect();
    for file in &receipt.files {
        let own = file.path == decoder.relative;
        let spans = data.get(&file.path).map_or(&[][..], Vec::as_slice);
        let used = |span: ByteSpan| own || spans.iter().any(|other| overlap(span, *other));
        let ranges = file.ranges.iter().filter(|range| used(range.span()));
        layers.extend(ranges.map(|range| range.layer));
    }
    Ok(layers)
}

fn overlap(a: ByteSpan, b: ByteSpan) -> bool {
    a.offset < b.offset.saturating_add(b.len) && b.offset < a.offset.saturating_add(a.len)
}

/// Whether nothing but the planned ranges differs from the original.
fn against_original(
    verdict: &mut Verdict,
    subject: &Subject<'_>,
    original: &Path,
    receipt: &Receipt,
    policy: &Policy,
) -> Result<(), Error> {
    let mut findings = Vec::new();
    let tree = Bundle::open(original)?;
    for RecheckedFile { file, ranges, .. } in &recheck_original(tree.tree(), receipt)? {
        let other = ranges.is_empty() && !file.ranges.is_empty()
            || ranges.iter().any(|(range, state)| {
                *state != RangeState::Untouched && range.sha256_before != range.sha256_after
            });
        if other {
            let path = file.path.as_str();
            let message = format!("{path}: not the bytes that the receipt says were edited");
            findings.push(Finding::new(Code::OriginalMismatch, message).in_file(path));
        }
    }
    let report = diff(original, subject.folder)?;
    for (code, files, what) in [
        (Code::FileAdded, &report.added, "is not in the original"),
        (
            Code::FileRemoved,
            &report.removed,
            "is only in the original",
        ),
    ] {
        for file in files {
            findings.push(Finding::new(code, format!("{file}: {what}")).in_file(file));
        }
    }
    for file in &report.changed {
        let path = file.path.as_str();
        let mut planned = receipt.files.iter().filter(|planned| planned.path == path);
        let as_planned = planned.any(|planned| {
            let before = planned.bytes_before.unwrap_or(planned.bytes);
            (before, planned.bytes) == (file.bytes_a, file.bytes_b)
        });
        if file.bytes_a != file.bytes_b && !as_planned {
            let message = format!(
                "{path}: {} bytes in the original, {} here",
                file.bytes_a, file.bytes_b
            );
            findings.push(Finding::new(Code::OutsideChanged, message).in_file(path));
        }
        for range in file
            .ranges
            .iter()
            .filter(|range| range.planned != Some(true))
        {
            let tensors = match range.tensors.as_slice() {
                [] => String::new(),
                names => format!(" ('{}')", names.join("', '")),
            };
            let message = format!(
                "{path}: {} outside the planned ranges, from offset {}{tensors}",
                counted(range.changed_bytes, "changed byte"),
                range.offset
            );
            findings.push(Finding::new(Code::OutsideChanged, message).in_file(path));
        }
    }
    if report.only_planned_ranges_changed == Some(false) && findings.is_empty() {
        let message = "the difference from the original is not what the receipt says";
        findings.push(Finding::new(Code::OutsideChanged, message));
    }
    let summary = format!(
        "compared with the original: {} identical, {} changed",
        counted(report.identical_files, "file"),
        report.changed.len()
    );
    verdict.add(policy, "outside", summary, findings, None);
    Ok(())
}

/// What can be said of the other bytes without the original: whole-file digests, where there are any.
fn without_original(
    verdict: &mut Verdict,
    tree: &Tree,
    files: &[RecheckedFile<'_>],
    policy: &Policy,
) {
    let mut findings = Vec::new();
    let mut named = BTreeSet::new();
    for RecheckedFile { file, sha256, .. } in files {
        let path = file.path.as_str();
        if let Some(expected) = file.sha256_after {
            named.insert(path);
            if sha256.is_some_and(|found| found != expected) {
                let message = format!("{path}: not the file that was written, by its sha256");
                findings.push(Finding::new(Code::FileAltered, message).in_file(path));
            }
        }
    }
    let others: Vec<&str> = tree
        .entries()
        .map(|entry| entry.relative.as_str())
        .filter(|&path| path != RECEIPT && !named.contains(path))
        .collect();
    if let Some(first) = others.first() {
        let message = format!(
            "the original was not given: unplanned bytes of {} ({first}{}) could not be checked",
            counted(others.len(), "file"),
            if others.len() > 1 { ", …" } else { "" }
        );
        findings.push(Finding::new(Code::OutsideUnchecked, message));
    }
    let summary = format!(
        "{} checked by their sha256",
        counted(named.len(), "whole file")
    );
    verdict.add(policy, "outside", summary, findings, None);
}

/// "1 file", "2 files".
fn counted(count: impl TryInto<u64> + Copy, what: &str) -> String {
    let count = count.try_into().unwrap_or(u64::MAX);
    match count {
        1 => format!("1 {what}"),
        _ => format!("{count} {what}s"),
    }
}
