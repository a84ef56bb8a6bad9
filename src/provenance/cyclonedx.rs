//! A bill of materials of the unlearned model: CycloneDX 1.6 with an ML model card.
//!
//! Source: the CycloneDX 1.6 JSON schema, against which `tools/provenance/check.py` validates what is
//! written. No serial number and no time: the same folder gives the same text.

use serde_json::{Value, json};

use super::Resource;
use crate::bundle::Bundle;
use crate::edit::Receipt;

/// The bill of the model `name`: its files, what it was made from, and what was done.
pub fn bill(
    name: &str,
    bundle: &Bundle,
    receipt: &Receipt,
    files: &[Resource],
    original: Option<&str>,
) -> Value {
    let hashes = |resource: &Resource| json!([{"alg": "SHA-256", "content": resource.sha256}]);
    let property =
        |name: &str, value: String| json!({"name": format!("kvw:{name}"), "value": value});
    let ranges: usize = receipt.files.iter().map(|file| file.ranges.len()).sum();
    let mut model = json!({
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": name,
        "modelCard": {
            "bom-ref": "model-card",
            "modelParameters": {},
            "considerations": {
                "technicalLimitations": [
                    "Weakening is not proof of erasure: what was measured is in the evaluation, and nothing more.",
                ],
            },
            "properties": [
                property("plan_digest", receipt.plan_digest.to_string()),
                property("rule", receipt.plan.get("rule").and_then(Value::as_str).unwrap_or_default().to_owned()),
                property("edited_files", receipt.files.len().to_string()),
                property("edited_ranges", ranges.to_string()),
            ],
        },
        "pedigree": {
            "ancestors": [{
                "type": "machine-learning-model",
                "bom-ref": "original",
                "name": original.unwrap_or("the model before the edit"),
            }],
            "notes": "Knowledge vectors were weakened; every other byte is the ancestor's.",
        },
    });
    if let Some(family) = bundle.family() {
        model["modelCard"]["modelParameters"]["architectureFamily"] = family.into();
    }
    json!({
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "tools": {"components": [{"type": "application", "name": "kvw", "version": receipt.version}]},
            "component": model,
        },
        "components": files.iter().map(|resource| json!({
            "type": "file",
            "bom-ref": format!("file:{}", resource.name),
            "name": resource.name,
            "hashes": hashes(resource),
        })).collect::<Vec<_>>(),
    })
}
