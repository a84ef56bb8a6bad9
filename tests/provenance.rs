//! What `kvw sign` writes vouches for every byte of a folder, and says where it comes from.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use kvw::bundle::Bundle;
use kvw::edit::{self, EditPlan};
use kvw::provenance::key::{PrivateKey, PublicKey};
use kvw::provenance::{
    BOM, Error, SIGNATURE, STATEMENT, SUMS, SignOptions, Verification, sign, verify,
};
use p256::elliptic_curve::pkcs8::{EncodePrivateKey as _, EncodePublicKey as _, LineEnding};
use proptest::prelude::*;
use support::fixtures;
use tempfile::TempDir;

/// An unlearned model, and two keys.
struct Desk {
    folder: TempDir,
    original: PathBuf,
    out: PathBuf,
}

impl Desk {
    fn new() -> Desk {
        let folder = tempfile::tempdir().unwrap();
        let original = fixtures().join("exports/tjs-qwen2_vl");
        let bundle = Bundle::open(&original).unwrap();
        let decoder = bundle.components(None).unwrap().decoder;
        let identity = edit::identity_of(&bundle, decoder).unwrap();
        let gates = identity
            .layers
            .iter()
            .map(|layer| {
                let width = usize::try_from(layer.d_ff).unwrap();
                (layer.layer, vec![0.5; width])
            })
            .collect::<BTreeMap<_, _>>();
        let plan = EditPlan::new(&bundle, &gates, &identity).unwrap();
        let out = folder.path().join("unlearned");
        let options = edit::Options {
            plan: serde_json::json!({"rule": "kvw", "data": {"forget": {"sha256": "00".repeat(32)}}}),
            ..edit::Options::default()
        };
        edit::apply(&bundle, &plan, &out, &options, &|_| {}).unwrap();
        Desk {
            folder,
            original,
            out,
        }
    }

    fn key(&self, seed: u8) -> (PrivateKey, PublicKey) {
        let secret = p256::SecretKey::from_slice(&[seed; 32]).unwrap();
        let write = |name: &str, pem: &str| {
            let path = self.folder.path().join(name);
            fs::write(&path, pem).unwrap();
            path
        };
        let private = write("key.pem", &secret.to_pkcs8_pem(LineEnding::LF).unwrap());
        let public = secret.public_key().to_public_key_pem(LineEnding::LF);
        let public = write("public.pem", &public.unwrap());
        (
            PrivateKey::read(&private).unwrap(),
            PublicKey::read(&public).unwrap(),
        )
    }

    fn sign(&self, key: Option<&PrivateKey>) {
        let options = SignOptions {
            key,
            original: Some(&self.original),
            bill: true,
        };
        sign(&self.out, &options).unwrap();
    }
}

fn codes(verification: &Verification) -> Vec<(&'static str, &str)> {
    let findings = verification.findings.iter();
    findings
        .map(|found| (found.code, found.file.as_str()))
        .collect()
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_signed_folder_verifies_with_its_key_and_no_other() {
    let desk = Desk::new();
    let (private, public) = desk.key(7);
    desk.sign(Some(&private));
    let verification = verify(&desk.out, Some(&public)).unwrap();
    assert!(verification.passed && verification.signature_checked);
    let names: Vec<_> = verification.checked.keys().copied().collect();
    assert_eq!(names, [SUMS, SIGNATURE]);

    let (_, other) = desk.key(8);
    let verification = verify(&desk.out, Some(&other)).unwrap();
    assert_eq!(
        codes(&verification),
        [
            ("signature-invalid", SIGNATURE),
            ("statement-signature-invalid", STATEMENT)
        ]
    );
}

#[test]
fn signing_twice_gives_the_same_bytes_and_leaves_no_stale_signature() {
    let desk = Desk::new();
    let (private, public) = desk.key(7);
    let read = || [SUMS, STATEMENT, BOM, SIGNATURE].map(|name| fs::read(desk.out.join(name)).ok());
    desk.sign(Some(&private));
    let first = read();
    desk.sign(Some(&private));
    assert!(first == read());
    desk.sign(None);
    assert!(!desk.out.join(SIGNATURE).exists());
    let verification = verify(&desk.out, Some(&public)).unwrap();
    assert_eq!(
        codes(&verification),
        [
            ("signature-missing", SIGNATURE),
            ("statement-signature-invalid", STATEMENT)
        ]
    );
}

#[test]
fn a_file_that_is_added_or_removed_is_found() {
    let desk = Desk::new();
    let (private, public) = desk.key(7);
    desk.sign(Some(&private));
    fs::write(desk.out.join("extra.json"), "{}").unwrap();
    fs::remove_file(desk.out.join("config.json")).unwrap();
    let verification = verify(&desk.out, Some(&public)).unwrap();
    let expected = [
        ("file-missing", "config.json"),
        ("file-unexpected", "extra.json"),
    ];
    assert_eq!(codes(&verification), [expected, expected].concat());
}

#[test]
fn a_signature_is_not_handed_on_to_a_folder_that_is_edited_again() {
    let desk = Desk::new();
    let (private, public) = desk.key(7);
    desk.sign(Some(&private));
    let bundle = Bundle::open(&desk.out).unwrap();
    let decoder = bundle.components(None).unwrap().decoder;
    let identity = edit::identity_of(&bundle, decoder).unwrap();
    let width = usize::try_from(identity.layers[0].d_ff).unwrap();
    let gates = [(0.into(), vec![0.25; width])].into();
    let plan = EditPlan::new(&bundle, &gates, &identity).unwrap();
    let again = desk.folder.path().join("again");
    edit::apply(&bundle, &plan, &again, &edit::Options::default(), &|_| {}).unwrap();
    for name in [SUMS, STATEMENT, BOM, SIGNATURE] {
        assert!(
            desk.out.join(name).exists() && !again.join(name).exists(),
            "{name}"
        );
    }
    assert!(again.join("config.json").exists());
    // And whoever looks for one finds none, not a wrong one.
    let verification = verify(&again, Some(&public));
    assert!(
        matches!(verification, Err(Error::Format { .. })),
        "{verification:?}"
    );
}

#[test]
fn the_statement_names_the_original_the_data_and_the_plan() {
    let desk = Desk::new();
    desk.sign(None);
    let envelope: kvw::provenance::dsse::Envelope =
        serde_json::from_value(json(&desk.out.join(STATEMENT))).unwrap();
    let statement = envelope.statement().unwrap();
    let dependencies = &statement["predicate"]["buildDefinition"]["resolvedDependencies"];
    let names: Vec<&str> = dependencies
        .as_array()
        .unwrap()
        .iter()
        .map(|dependency| dependency["name"].as_str().unwrap())
        .collect();
    assert!(names.contains(&"original/onnx/decoder_model_merged_fp16.onnx"));
    assert!(names.contains(&"data/forget"));
    let receipt = json(&desk.out.join("kvw.json"));
    let parameters = &statement["predicate"]["buildDefinition"]["externalParameters"];
    assert_eq!(parameters["plan_digest"], receipt["plan_digest"]);
}

#[test]
fn an_original_that_is_not_it_is_refused_and_so_is_a_folder_that_was_not_edited() {
    let desk = Desk::new();
    let other = desk.folder.path().join("other");
    let options = SignOptions {
        original: Some(&other),
        ..SignOptions::default()
    };
    fs::create_dir_all(other.join("onnx")).unwrap();
    for name in [
        "config.json",
        "onnx/decoder_model_merged_fp16.onnx",
        "onnx/embed_tokens_fp16.onnx",
    ] {
        fs::copy(desk.original.join(name), other.join(name)).unwrap();
    }
    sign(&desk.out, &options).unwrap();
    let path = other.join("onnx/decoder_model_merged_fp16.onnx");
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    let refused = sign(&desk.out, &options);
    assert!(
        matches!(refused, Err(Error::OtherOriginal { .. })),
        "{refused:?}"
    );
    let refused = sign(&other, &SignOptions::default());
    assert!(
        matches!(refused, Err(Error::NoReceipt { .. })),
        "{refused:?}"
    );
}

#[test]
fn keys_of_other_kinds_are_refused() {
    let desk = Desk::new();
    let path = desk.folder.path().join("key.pem");
    for text in [
        "",
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMA==\n-----END ENCRYPTED PRIVATE KEY-----\n",
        // An Ed25519 key.
        "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n-----END PRIVATE KEY-----\n",
    ] {
        fs::write(&path, text).unwrap();
        assert!(
            matches!(PrivateKey::read(&path), Err(Error::Key { .. })),
            "{text}"
        );
        assert!(
            matches!(PublicKey::read(&path), Err(Error::Key { .. })),
            "{text}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_changed_byte_of_any_file_is_found(file in any::<prop::sample::Index>(), place in any::<prop::sample::Index>(), flip in 1u8..) {
        static DESK: std::sync::LazyLock<Desk> = std::sync::LazyLock::new(|| {
            let desk = Desk::new();
            let (private, _) = desk.key(7);
            desk.sign(Some(&private));
            desk
        });
        let (_, public) = DESK.key(7);
        let names = ["kvw.json", "config.json", SUMS, STATEMENT, BOM, SIGNATURE, "onnx/embed_tokens_fp16.onnx"];
        let path = DESK.out.join(file.get(&names));
        let bytes = fs::read(&path).unwrap();
        let mut changed = bytes.clone();
        changed[place.index(bytes.len())] ^= flip;
        fs::write(&path, &changed).unwrap();
        let found = verify(&DESK.out, Some(&public)).map_or(true, |verification| !verification.passed);
        fs::write(&path, &bytes).unwrap();
        prop_assert!(found, "{} at {}", path.display(), place.index(bytes.len()));
    }
}
