//! `kvw apply --in-place`: the bytes of a new folder, where the model lies; what stands in the way; what comes after a
//! crash; and the way back.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use kvw::bundle::Bundle;
use kvw::edit::{self, EditPlan, Options, in_place};
use kvw::files::journal::JOURNAL;
use kvw::files::{FolderLock, Sha256};
use kvw::graph::LayerId;
use kvw::kvw::{Plan, save_plan};
use kvw::onnx::{Limits, ModelFile};
use tempfile::TempDir;

const DECODER: &str = "onnx/decoder_model_merged.onnx";

/// A model folder with its decoder in these variants, and a plan for it.
struct Desk {
    dir: TempDir,
    plan: Plan,
    identity: edit::ModelIdentity,
}

impl Desk {
    fn new(variants: &[&str]) -> Desk {
        let dir = tempfile::tempdir().unwrap();
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/edits/qwen2_vl");
        let model = dir.path().join("model");
        fs::create_dir_all(model.join("onnx")).unwrap();
        let copy = |name: &str| fs::copy(from.join(name), model.join(name)).unwrap();
        copy("config.json");
        copy("onnx/embed_tokens.onnx");
        for variant in variants {
            copy(&format!("onnx/decoder_model_merged{variant}.onnx"));
        }
        fs::write(model.join("SHA256SUMS"), "of the model as it was").unwrap();
        fs::write(model.join("model.sig"), "of the model as it was").unwrap();
        // Whatever the variants of this folder, the plan is one of the float32 file.
        let full = tempfile::tempdir().unwrap();
        fs::create_dir(full.path().join("onnx")).unwrap();
        for name in ["config.json", "onnx/embed_tokens.onnx", DECODER] {
            fs::copy(from.join(name), full.path().join(name)).unwrap();
        }
        let bundle = Bundle::open(full.path()).unwrap();
        let file = bundle.decoders().next().unwrap();
        let identity = edit::identity_of(&bundle, file).unwrap();
        let gates: BTreeMap<LayerId, Vec<f32>> = (identity.layers.iter())
            .map(|layer| {
                let gates = (0..layer.d_ff).map(|neuron| (neuron + 1) as f32 / layer.d_ff as f32);
                (layer.layer, gates.collect())
            })
            .collect();
        let desk = Desk {
            dir,
            plan: Plan {
                gates,
                rule: "knowledge-vector-weakening".into(),
                parameters: serde_json::json!({}),
                steps: 1,
            },
            identity,
        };
        let about = serde_json::json!({"model": desk.identity});
        save_plan(&desk.path("plan"), &desk.plan, about, false).unwrap();
        desk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn model(&self) -> PathBuf {
        self.path("model")
    }

    fn kvw(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvw"));
        command.current_dir(self.dir.path()).args(arguments);
        command.output().unwrap()
    }

    /// Runs the verb and returns what it printed.
    fn done(&self, arguments: &[&str]) -> String {
        let output = self.kvw(arguments);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    }

    /// Runs the verb, which must refuse, and returns what it said.
    fn refused(&self, arguments: &[&str]) -> String {
        let output = self.kvw(arguments);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// Commits the patch, and stops there.
    fn prepare(&self) {
        let bundle = Bundle::open(&self.model()).unwrap();
        let edits = EditPlan::new(&bundle, &self.plan.gates, &self.identity).unwrap();
        let (_, lock) = in_place::preflight(&bundle, &edits, None).unwrap();
        let options = Options {
            plan: serde_json::json!({"rule": self.plan.rule}),
            ..Options::default()
        };
        in_place::prepare(&bundle, &edits, &lock, None, &options, &|_| {}).unwrap();
    }
}

/// Every file below a folder, with its digest.
fn files(folder: &Path) -> BTreeMap<String, Sha256> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            let below = self::files(&path).into_iter();
            files.extend(below.map(|(below, digest)| (format!("{name}/{below}"), digest)));
        } else {
            files.insert(name, Sha256::of_file(&path).unwrap());
        }
    }
    files
}

#[test]
fn in_place_gives_the_bytes_of_a_new_folder_receipt_included() {
    for variants in [&[""][..], &["", "_fp16"], &["", "_fp16", "_q4", "_q4f16"]] {
        let desk = Desk::new(variants);
        desk.done(&["apply", "model", "--plan", "plan", "-o", "out"]);
        let said = desk.done(&["apply", "model", "--plan", "plan", "--in-place"]);
        assert!(said.contains("SHA256SUMS, model.sig"), "{said}");
        assert_eq!(files(&desk.path("out")), files(&desk.model()));
        let again = desk.refused(&["apply", "model", "--plan", "plan", "--in-place"]);
        assert!(again.contains("already applied"), "{again}");
    }
}

#[test]
fn a_dry_run_says_how_much_room_it_needs_and_writes_nothing() {
    let desk = Desk::new(&[""]);
    let before = files(&desk.model());
    let said = desk.done(&[
        "apply",
        "model",
        "--plan",
        "plan",
        "--in-place",
        "--dry-run",
        "--format",
        "json",
    ]);
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    let of = |key: &str| said["preflight"][key].as_u64().unwrap();
    let ranges = said["edits"].as_array().unwrap();
    let bytes: u64 = ranges
        .iter()
        .map(|edit| edit["span"]["len"].as_u64().unwrap())
        .sum();
    assert_eq!(of("changed_bytes"), bytes);
    assert_eq!(of("needed_bytes"), bytes + (1 << 20));
    assert_eq!(
        said["preflight"]["removed"],
        serde_json::json!(["SHA256SUMS", "model.sig"])
    );
    assert_eq!(files(&desk.model()), before);
}

#[test]
fn a_pending_patch_is_finished_first_and_nothing_reads_the_model_before() {
    let desk = Desk::new(&["", "_fp16"]);
    desk.done(&["apply", "model", "--plan", "plan", "-o", "out"]);
    let whole = desk.path("out");
    for finish in [
        &["apply", "model", "--resume"][..],
        &["apply", "model", "--plan", "plan", "--in-place"],
    ] {
        let desk = Desk::new(&["", "_fp16"]);
        desk.prepare();
        for verb in [
            &["inspect", "model"][..],
            &["inspect", "model/onnx/decoder_model_merged.onnx"],
            &["diff", "model", "model"],
            &["verify", "model"],
            &["sign", "model"],
            &["apply", "model", "--plan", "plan", "-o", "other"],
        ] {
            let said = desk.refused(verb);
            assert!(
                said.contains("half done") && said.contains("--resume"),
                "{verb:?}: {said}"
            );
        }
        desk.done(finish);
        assert!(!desk.model().join(JOURNAL).exists());
        // The receipt tells of the plan what the caller says, and here the caller is another.
        let without_receipt = |folder: &Path| {
            let mut files = files(folder);
            assert!(files.remove("kvw.json").is_some());
            files
        };
        let (found, wanted) = (without_receipt(&desk.model()), without_receipt(&whole));
        assert_eq!(found, wanted);
    }
    let nothing = desk.done(&["apply", "model", "--resume"]);
    assert!(nothing.contains("nothing was pending"), "{nothing}");
}

#[test]
fn an_undo_log_restores_every_byte_signature_included() {
    let desk = Desk::new(&["", "_fp16"]);
    let before = files(&desk.model());
    desk.done(&[
        "apply",
        "model",
        "--plan",
        "plan",
        "--in-place",
        "--undo-log",
        "undo",
    ]);
    assert_ne!(files(&desk.model()), before);
    desk.done(&["apply", "model", "--undo", "undo"]);
    assert_eq!(files(&desk.model()), before);
    // A log of another model changes nothing.
    let other = Desk::new(&[""]);
    fs::copy(desk.path("undo"), other.path("undo")).unwrap();
    let untouched = files(&other.model());
    other.refused(&["apply", "model", "--undo", "undo"]);
    assert_eq!(files(&other.model()), untouched);
}

#[test]
fn links_second_names_and_changed_graphs_are_refused_and_nothing_is_written() {
    let linked = Desk::new(&[""]);
    let file = linked.model().join(DECODER);
    fs::hard_link(&file, linked.path("second name")).unwrap();
    let symbolic = Desk::new(&[""]);
    let file = symbolic.model().join(DECODER);
    fs::rename(&file, symbolic.model().join("onnx/blob")).unwrap();
    std::os::unix::fs::symlink("blob", &file).unwrap();
    let graph = Desk::new(&["_int8"]);
    for (desk, reason) in [
        (linked, "hard links"),
        (symbolic, "symbolic link"),
        (graph, "its graph changes"),
    ] {
        let before = files(&desk.model());
        let said = desk.refused(&["apply", "model", "--plan", "plan", "--in-place"]);
        assert!(said.contains(reason) && said.contains("-o"), "{said}");
        assert_eq!(files(&desk.model()), before);
    }
}

#[test]
fn a_second_writer_is_refused() {
    let desk = Desk::new(&[""]);
    let _lock = FolderLock::take(&desk.model()).unwrap();
    for verb in [
        &["apply", "model", "--plan", "plan", "--in-place"][..],
        &["apply", "model", "--resume"],
        &["sign", "model"],
    ] {
        let said = desk.refused(verb);
        assert!(said.contains("another run of kvw"), "{verb:?}: {said}");
    }
}

#[test]
fn a_shredded_plan_is_gone_and_only_after_the_patch() {
    let desk = Desk::new(&[""]);
    fs::hard_link(desk.path("plan"), desk.path("second name")).unwrap();
    let arguments = [
        "apply",
        "model",
        "--plan",
        "plan",
        "--in-place",
        "--shred-plan",
    ];
    let said = desk.refused(&arguments);
    assert!(said.contains("hard links"), "{said}");
    fs::remove_file(desk.path("second name")).unwrap();
    // Another name for the open file shows what was written over it.
    let kept = fs::File::open(desk.path("plan")).unwrap();
    desk.done(&arguments);
    assert!(!desk.path("plan").exists());
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut { kept }, &mut bytes).unwrap();
    assert!(!bytes.is_empty() && bytes.iter().all(|&byte| byte == 0));
}

#[test]
fn what_is_below_the_threshold_is_exactly_zero_and_the_receipt_says_so() {
    let desk = Desk::new(&["", "_fp16"]);
    desk.done(&[
        "apply",
        "model",
        "--plan",
        "plan",
        "-o",
        "out",
        "--zero-below",
        "0.25",
    ]);
    let receipt = fs::read(desk.path("out/kvw.json")).unwrap();
    let receipt: serde_json::Value = serde_json::from_slice(&receipt).unwrap();
    let gates = desk.plan.gates.values().flatten();
    let removed = gates.filter(|&&gate| gate < 0.25).count();
    let expected = serde_json::json!({"gate": 0.25, "removed": removed});
    assert_eq!(receipt["plan"]["zero_below"], expected);
    assert!(removed > 0);
    // Its bytes: every other element of the file is untouched or scaled, these are positive zeros.
    let model = ModelFile::open(&desk.path("out").join(DECODER), &Limits::default()).unwrap();
    let edit = &receipt["files"][0]["ranges"][0];
    let of = |key: &str| usize::try_from(edit[key].as_u64().unwrap()).unwrap();
    let bytes = fs::read(desk.path("out").join(DECODER)).unwrap();
    let values = &bytes[of("offset")..of("offset") + of("len")];
    let zeros = values.chunks(4).filter(|value| *value == [0; 4]).count();
    let layer = &desk.identity.layers[of("layer")];
    let below = desk.plan.gates[&layer.layer]
        .iter()
        .filter(|&&gate| gate < 0.25)
        .count();
    assert!(zeros >= below * usize::try_from(layer.d_model).unwrap());
    assert!(!model.graph().node.is_empty());
    // Quantized weights would keep the vectors.
    let quantized = Desk::new(&["", "_q4"]);
    let said = quantized.refused(&[
        "apply",
        "model",
        "--plan",
        "plan",
        "-o",
        "out",
        "--zero-below",
        "0.25",
    ]);
    assert!(said.contains("would not remove"), "{said}");
    assert!(!quantized.path("out").exists());
}
