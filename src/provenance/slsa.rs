//! What was done, as an in-toto statement with SLSA provenance v1: from which bytes, by which plan, to
//! which bytes.
//!
//! Source: in-toto attestation v1; slsa.dev provenance v1. Subjects are the files of the folder;
//! dependencies are the files of the original (where it is at hand) and the data sets by digest; the
//! receipt, which names every changed range, is a by-product. No time and no host: the same edit gives the
//! same statement.

use serde_json::{Value, json};

use super::Resource;
use crate::edit::Receipt;
use crate::files::RECEIPT;

/// The statement about the files `output`, made from `original`.
pub fn statement(receipt: &Receipt, output: &[Resource], original: Option<&[Resource]>) -> Value {
    let descriptor = |name: String, resource: &Resource| {
        json!({
            "name": name, "digest": {"sha256": resource.sha256},
        })
    };
    let originals = original.unwrap_or_default().iter();
    let mut dependencies: Vec<Value> = originals
        .map(|resource| descriptor(format!("original/{}", resource.name), resource))
        .collect();
    let data = receipt.plan.get("data").and_then(Value::as_object);
    for (set, about) in data.into_iter().flatten() {
        if let Some(digest) = about.get("sha256") {
            dependencies.push(json!({"name": format!("data/{set}"), "digest": {"sha256": digest}}));
        }
    }
    let descriptors = |wanted: fn(&str) -> bool| -> Vec<Value> {
        let wanted = output.iter().filter(|resource| wanted(&resource.name));
        wanted
            .map(|resource| descriptor(resource.name.clone(), resource))
            .collect()
    };
    json!({
        "_type": "https://in-toto.io/Statement/v1",
        "subject": descriptors(|_| true),
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "urn:kvw:edit:1",
                "externalParameters": {
                    "plan_digest": receipt.plan_digest,
                    "rule": receipt.plan.get("rule"),
                    "parameters": receipt.plan.get("parameters"),
                    "steps": receipt.plan.get("steps"),
                },
                "internalParameters": {"runtime": receipt.plan.get("runtime")},
                "resolvedDependencies": dependencies,
            },
            "runDetails": {
                "builder": {"id": "urn:kvw", "version": {"kvw": receipt.version}},
                "byproducts": descriptors(|name| name == RECEIPT),
            },
        },
    })
}
