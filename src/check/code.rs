//! Every kind of finding, by its stable code.
//!
//! A code never changes its meaning and is never used again for another. How severe a finding is
//! belongs to the policy: what stands here is only what holds where the policy says nothing.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How much a finding weighs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The check fails.
    Error,
    /// The check passes, and says so loudly.
    Warning,
    /// The check passes, and mentions it.
    Note,
    /// Not mentioned.
    Off,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Severity::Error => "error",
            Severity::Warning => "warning",
            Severity::Note => "note",
            Severity::Off => "off",
        })
    }
}

macro_rules! codes {
    ($($variant:ident $code:literal $severity:ident $description:literal;)+) => {
        /// A kind of finding.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum Code {
            $(#[doc = $description] $variant,)+
        }

        impl Code {
            /// Every code.
            pub const ALL: &'static [Code] = &[$(Code::$variant),+];

            /// The code as it is written, in kebab-case.
            pub fn as_str(self) -> &'static str {
                match self { $(Code::$variant => $code,)+ }
            }

            /// What it means, in a sentence.
            pub fn description(self) -> &'static str {
                match self { $(Code::$variant => $description,)+ }
            }

            /// How severe it is where the policy says nothing.
            pub fn default_severity(self) -> Severity {
                match self { $(Code::$variant => Severity::$severity,)+ }
            }
        }
    };
}

codes! {
    ReceiptMissing "receipt-missing" Error
        "The folder has no receipt: nothing says that anything was unlearned in it.";
    ReceiptInvalid "receipt-invalid" Error
        "The receipt is not one of kvw, or of a version that this kvw does not read.";
    ToolVersion "tool-version" Error
        "The receipt was written by a kvw that the policy does not allow.";
    EditedRepeatedly "edited-repeatedly" Note
        "The folder was edited more than once; the checks of bytes cover the last edit.";
    NothingEdited "nothing-edited" Error
        "The receipt names no range in which a byte changed.";
    FileMissing "file-missing" Error
        "A file that the receipt names is not there.";
    FileLength "file-length" Error
        "A file has another length than the receipt says.";
    RangeNotEdited "range-not-edited" Error
        "A planned range still holds the original's bytes: the model knows what it should not.";
    RangeAltered "range-altered" Error
        "A planned range holds neither the original's bytes nor those that were written.";
    FileAltered "file-altered" Error
        "A whole file has another digest than the receipt says.";
    OutsideUnchecked "outside-unchecked" Error
        "Without the original or whole-file digests nobody can say whether other bytes changed.";
    OutsideChanged "outside-changed" Error
        "A byte outside the planned ranges differs from the original.";
    FileAdded "file-added" Error
        "The folder has a file that the original does not have.";
    FileRemoved "file-removed" Error
        "The original has a file that the folder does not have.";
    OriginalMismatch "original-mismatch" Error
        "What was given as the original is not the model that was edited.";
    DecoderNotEdited "decoder-not-edited" Error
        "A decoder file of the folder has no planned range: it still knows.";
    LayerNotEdited "layer-not-edited" Error
        "A decoder or vision encoder file lacks the edit of a layer that was edited in another.";
    VariantMissing "variant-missing" Error
        "A precision that the policy asks for is not in the folder.";
    EvidenceMissing "evidence-missing" Error
        "There is no evaluation: neither a file nor a summary in the receipt.";
    EvidenceNotRead "evidence-not-read" Note
        "No evaluation file was given: numbers are the receipt's copy.";
    EvidenceUnbound "evidence-unbound" Error
        "The receipt names no evaluation, so nothing ties the given one to this model.";
    EvidenceMismatch "evidence-mismatch" Error
        "The evaluation is not the one that the receipt names: it may be another model's.";
    AgreementFailed "agreement-failed" Error
        "The written model did not compute what the plan says.";
    AgreementMissing "agreement-missing" Warning
        "Nobody compared what the written model computes with what the plan says.";
    SetMissing "set-missing" Error
        "The policy judges a set that was not evaluated.";
    SetDigest "set-digest" Error
        "A set is not the data that the policy pins.";
    SetTooSmall "set-too-small" Error
        "A set has fewer samples than the policy asks for.";
    ModelMissing "model-missing" Error
        "The policy compares with a model that was not evaluated.";
    MetricMissing "metric-missing" Error
        "The policy judges a metric that the evaluation does not have.";
    MetricNotComputed "metric-not-computed" Error
        "The policy judges a metric that could not be computed.";
    IntervalMissing "interval-missing" Error
        "The policy judges the end of an interval, and the metric has none.";
    AboveMaximum "above-maximum" Error
        "A metric is, or may be, above its maximum.";
    BelowMinimum "below-minimum" Error
        "A metric is, or may be, below its minimum.";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A text that is no code.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no finding's code")]
pub struct UnknownCode(pub String);

impl FromStr for Code {
    type Err = UnknownCode;

    fn from_str(text: &str) -> Result<Self, UnknownCode> {
        let known = Code::ALL.iter().find(|code| code.as_str() == text);
        known.copied().ok_or_else(|| UnknownCode(text.to_owned()))
    }
}

impl Serialize for Code {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// The list that pipelines rely on. A line may be added; one that changes or goes away breaks them.
    const LIST: &str = "\
receipt-missing error
receipt-invalid error
tool-version error
edited-repeatedly note
nothing-edited error
file-missing error
file-length error
range-not-edited error
range-altered error
file-altered error
outside-unchecked error
outside-changed error
file-added error
file-removed error
original-mismatch error
decoder-not-edited error
layer-not-edited error
variant-missing error
evidence-missing error
evidence-not-read note
evidence-unbound error
evidence-mismatch error
agreement-failed error
agreement-missing warning
set-missing error
set-digest error
set-too-small error
model-missing error
metric-missing error
metric-not-computed error
interval-missing error
above-maximum error
below-minimum error
";

    #[test]
    fn codes_are_unique_in_kebab_case_and_stable() {
        let codes: BTreeSet<&str> = Code::ALL.iter().map(|code| code.as_str()).collect();
        assert_eq!(codes.len(), Code::ALL.len());
        let list: String = Code::ALL
            .iter()
            .map(|code| format!("{code} {}\n", code.default_severity()))
            .collect();
        assert_eq!(list, LIST);
        for code in Code::ALL {
            let text = code.as_str();
            assert!(
                text.chars().all(|c| c.is_ascii_lowercase() || c == '-'),
                "{text}"
            );
            assert_eq!(text.parse(), Ok(*code));
            assert!(code.description().ends_with('.'), "{text}");
        }
    }
}
