//! The command line: what it promises, what it refuses, and that a refusal leaves nothing behind.
//!
//! Every command runs in a clean environment on the demo model. ONNX Runtime is located (or fetched)
//! once, by this process, and handed to the commands.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::indexing_slicing
)]

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{LazyLock, OnceLock};

use kvw::bundle::Bundle;
use kvw::onnx::List;
use kvw::onnx::schema::tensor_proto::DataLocation;
use kvw::onnx::schema::{ModelProto, StringStringEntryProto, TensorProto};
use kvw::runtime::device::Device;
use kvw::runtime::locate;
use prost::Message as _;
use serde_json::{Value, json};
use tempfile::TempDir;

const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/demo");
const DECODER: &str = "onnx/decoder_model_merged.onnx";

/// A gate strength that suits a handful of steps.
const GAMMA: &str = "2";

// ---- running the command ---------------------------------------------------------------------------

/// The command, in an environment that holds a search path and an empty cache.
fn bare() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvw"));
    command.env_clear();
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli/cache");
    command.env("KVW_CACHE_DIR", cache);
    for name in ["PATH", "TMPDIR"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command
}

/// The library that these tests run on, located with this process's environment.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let options = locate::Options::from_env(None, Device::Cpu, false).unwrap();
        locate::locate(&options, &|line| println!("{line}"))
            .unwrap()
            .path
    })
}

/// The command, in a folder, with ONNX Runtime at hand.
fn kvw(folder: &Path) -> Command {
    let mut command = bare();
    command.current_dir(folder).env("ORT_DYLIB_PATH", library());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Runs a command that must succeed, silently but for its result.
fn done(command: &mut Command) -> String {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    assert!(status.success(), "{command:?}\n{status}\n{}", text(&stderr));
    text(&stdout)
}

/// A JSON object's keys and values, repeated keys kept.
struct Pairs(Vec<(String, Value)>);

impl<'de> serde::Deserialize<'de> for Pairs {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Pairs;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: serde::de::MapAccess<'de>>(
                self,
                mut map: A,
            ) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

/// Runs a command that must succeed with `--format json`, and checks what every result has.
fn json(command: &mut Command) -> Value {
    let stdout = done(command.args(["--format", "json"]));
    let Pairs(pairs) = serde_json::from_str(&stdout).unwrap();
    let mut object = serde_json::Map::new();
    for (key, value) in pairs {
        assert!(!object.contains_key(&key), "`{key}` is there twice");
        object.insert(key, value);
    }
    let version = match object["verb"].as_str() {
        Some("demo" | "eval" | "probe" | "unlearn") => 2,
        _ => 1,
    };
    assert_eq!(object["schema_version"], json!(version));
    Value::Object(object)
}

/// Every file below a folder with its bytes; folders have none.
fn tree(folder: &Path) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            let relative = path.strip_prefix(folder).unwrap().to_owned();
            if path.is_dir() {
                found.insert(relative, None);
                folders.push(path);
            } else {
                found.insert(relative, Some(fs::read(&path).unwrap()));
            }
        }
    }
    found
}

/// Runs a command that must fail with `code`, say `expected` on standard error and nothing on standard
/// output, and leave its folder as it was.
#[track_caller]
fn fails(code: i32, command: &mut Command, expected: &[&str]) -> String {
    let folder = command.get_current_dir().map(Path::to_owned);
    let before = folder.as_deref().map(tree);
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let stderr = text(&stderr);
    assert_eq!(status.code(), Some(code), "{command:?}\n{stderr}");
    assert_eq!(text(&stdout), "", "{command:?}");
    for part in expected {
        assert!(
            stderr.contains(part),
            "{command:?}\nexpected {part:?} in\n{stderr}"
        );
    }
    let names =
        |tree: Option<BTreeMap<PathBuf, _>>| tree.map(|t| t.into_keys().collect::<Vec<_>>());
    let after = folder.as_deref().map(tree);
    let same = before == after;
    assert!(
        same,
        "{command:?} changed its folder\n{:?}\n{:?}",
        names(before),
        names(after)
    );
    stderr
}

#[track_caller]
fn refuses(command: &mut Command, expected: &[&str]) -> String {
    fails(2, command, expected)
}

// ---- inputs ----------------------------------------------------------------------------------------

fn demo(path: &str) -> PathBuf {
    let path = Path::new(DEMO).join(path);
    assert!(path.exists(), "{} is missing", path.display());
    path
}

static MODEL: LazyLock<PathBuf> = LazyLock::new(|| demo("model"));

/// A copy of the demo model, to be damaged.
fn model_copy(folder: &Path) -> PathBuf {
    let copy = folder.join("model");
    for (name, bytes) in tree(&MODEL) {
        let path = copy.join(name);
        match bytes {
            None => fs::create_dir_all(path).unwrap(),
            Some(bytes) => {
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, bytes).unwrap();
            }
        }
    }
    copy
}

/// The first rows of a demo set, with absolute image paths.
fn rows(set: &str, count: usize) -> Vec<Value> {
    let lines = fs::read_to_string(demo(&format!("data/{set}.jsonl"))).unwrap();
    let rows = lines.lines().take(count).map(|line| {
        let mut row: Value = serde_json::from_str(line).unwrap();
        if let Some(image) = row["image"].as_str() {
            row["image"] = json!(demo("data").join(image));
        }
        row
    });
    rows.collect()
}

fn write_rows(path: &Path, rows: &[Value]) -> PathBuf {
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    fs::write(path, lines).unwrap();
    path.to_owned()
}

/// Inputs in one folder, outputs in another.
struct Desk {
    _folder: TempDir,
    inputs: PathBuf,
    /// The commands' current folder; empty at first.
    work: PathBuf,
    forget: PathBuf,
    retain: PathBuf,
    gamma: &'static str,
}

impl Desk {
    fn new() -> Desk {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        let (inputs, work) = (root.join("inputs"), root.join("work"));
        fs::create_dir(&inputs).unwrap();
        fs::create_dir(&work).unwrap();
        Desk {
            forget: write_rows(&inputs.join("forget.jsonl"), &rows("forget", 3)),
            retain: write_rows(&inputs.join("retain.jsonl"), &rows("retain", 4)),
            gamma: GAMMA,
            inputs,
            work,
            _folder: folder,
        }
    }

    fn kvw(&self) -> Command {
        kvw(&self.work)
    }

    fn collect(&self, model: &Path) -> Command {
        let mut command = self.kvw();
        command.arg("collect").arg(model).arg("--data");
        command.arg(&self.retain).args(["-o", "retain.kc"]);
        command
    }

    fn weaken(&self, model: &Path, coefficients: &Path) -> Command {
        let mut command = self.kvw();
        command.arg("weaken").arg(model).arg("--forget");
        command.arg(&self.forget).arg("--retain-coefficients");
        command.arg(coefficients).args(["-o", "forget.plan"]);
        command.args(["--gamma", self.gamma]);
        command
    }

    fn apply(&self, model: &Path, plan: &Path) -> Command {
        let mut command = self.kvw();
        command.arg("apply").arg(model).arg("--plan").arg(plan);
        command.args(["-o", "unlearned"]);
        command
    }

    fn unlearn(&self, model: &Path) -> Command {
        let mut command = self.kvw();
        command.arg("unlearn").arg(model).arg("--forget");
        command.arg(&self.forget).arg("--retain").arg(&self.retain);
        command.args(["-o", "unlearned", "--gamma", self.gamma]);
        command
    }

    fn eval(&self, model: &Path) -> Command {
        let mut command = self.kvw();
        command
            .arg("eval")
            .arg(model)
            .arg("--data")
            .arg(&self.forget);
        command.args(["--max-new-tokens", "5"]);
        command
    }
}

/// Coefficients and a plan of the demo model, made once for all tests.
struct Made {
    coefficients: PathBuf,
    plan: PathBuf,
}

fn made() -> &'static Made {
    static MADE: OnceLock<Made> = OnceLock::new();
    MADE.get_or_init(|| {
        let desk = Desk::new();
        done(&mut desk.collect(&MODEL));
        done(&mut desk.weaken(&MODEL, Path::new("retain.kc")));
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli");
        fs::create_dir_all(&folder).unwrap();
        let keep = |name: &str| {
            fs::copy(desk.work.join(name), folder.join(name)).unwrap();
            folder.join(name)
        };
        Made {
            coefficients: keep("retain.kc"),
            plan: keep("forget.plan"),
        }
    })
}

/// Names of the down projections' weights, by layer.
fn down_projections(model: &Path) -> Vec<String> {
    let inspection = kvw::edit::inspect(&Bundle::open(model).unwrap()).unwrap();
    let decoder = inspection.files.iter().find(|file| file.path == DECODER);
    let mlps = &decoder.unwrap().mlps;
    mlps.iter().map(|mlp| mlp.weight.clone()).collect()
}

/// Rewrites the decoder of a model folder.
fn edit_decoder(model: &Path, edit: impl FnOnce(&mut List<TensorProto>)) {
    let path = model.join(DECODER);
    let mut proto = ModelProto::decode(fs::read(&path).unwrap().as_slice()).unwrap();
    edit(&mut proto.graph.as_mut().unwrap().initializer);
    fs::write(&path, proto.encode_to_vec()).unwrap();
}

fn named<'a>(tensors: &'a mut [TensorProto], name: &str) -> &'a mut TensorProto {
    tensors.iter_mut().find(|t| t.name() == name).unwrap()
}

/// Says that layer 0's down projection lies in `location`, and returns its bytes and name.
fn externalize(model: &Path, location: &str) -> (Vec<u8>, String) {
    let name = down_projections(model).remove(0);
    let mut bytes = Vec::new();
    edit_decoder(model, |tensors| {
        let tensor = named(tensors, &name);
        bytes = tensor.raw_data.take().unwrap().to_vec();
        tensor.set_data_location(DataLocation::External);
        let entry = |key: &str, value: String| StringStringEntryProto {
            key: Some(key.into()),
            value: Some(value.into()),
        };
        tensor.external_data = [
            entry("location", location.into()),
            entry("offset", "0".into()),
            entry("length", bytes.len().to_string()),
        ]
        .into();
    });
    (bytes, name)
}

/// A command for each verb that reads a model.
fn on_model(desk: &Desk, model: &Path) -> Vec<Command> {
    let mut inspect = desk.kvw();
    inspect.arg("inspect").arg(model);
    let mut commands = on_weights(desk, model);
    commands.push(inspect);
    commands
}

/// A command for each verb that reads a model's weights, and not its graph only.
fn on_weights(desk: &Desk, model: &Path) -> Vec<Command> {
    vec![
        desk.collect(model),
        desk.weaken(model, &made().coefficients),
        desk.apply(model, &made().plan),
        desk.unlearn(model),
        desk.eval(model),
    ]
}

/// A command for each verb that reads a dataset.
fn on_data(desk: &Desk, data: &Path) -> Vec<Command> {
    let with = |flags: &[(&str, &Path)], verb: &str, output: Option<&str>| {
        let mut command = desk.kvw();
        command.arg(verb).arg(MODEL.as_path());
        for (flag, path) in flags {
            command.arg(flag).arg(path);
        }
        if let Some(output) = output {
            command.args(["-o", output]);
        }
        command
    };
    let coefficients = ("--retain-coefficients", made().coefficients.as_path());
    let forget = ("--forget", desk.forget.as_path());
    vec![
        with(&[("--data", data)], "collect", Some("retain.kc")),
        with(&[("--forget", data), coefficients], "weaken", Some("plan")),
        with(&[("--forget", data), coefficients], "unlearn", Some("out")),
        with(&[forget, ("--retain", data)], "unlearn", Some("out")),
        with(
            &[forget, coefficients, ("--eval", data)],
            "unlearn",
            Some("out"),
        ),
        with(&[("--data", data)], "eval", None),
    ]
}

// ---- help and usage --------------------------------------------------------------------------------

const VERBS: [&str; 14] = [
    "demo", "inspect", "unlearn", "collect", "weaken", "apply", "eval", "probe", "sweep", "diff",
    "check", "report", "doctor", "runtime",
];

#[test]
fn the_help_of_every_verb_names_its_arguments() {
    let weakening = [
        "--gamma",
        "--layers",
        "--epochs",
        "--batch-size",
        "--order",
        "--seed",
    ];
    let runtime = ["--device", "--threads", "--ort-lib", "--offline"];
    let expected: [(&str, &[&[&str]]); 14] = [
        ("demo", &[&["--output"], &runtime]),
        ("inspect", &[&["<MODEL>"]]),
        (
            "unlearn",
            &[
                &["<MODEL>", "--forget", "--retain", "-o, --output", "--force"],
                &weakening,
                &runtime,
            ],
        ),
        (
            "collect",
            &[&["<MODEL>", "--data", "-o, --output", "--force"], &runtime],
        ),
        (
            "weaken",
            &[
                &[
                    "<MODEL>",
                    "--forget",
                    "--retain-coefficients",
                    "-o, --output",
                    "--force",
                ],
                &weakening,
                &runtime,
            ],
        ),
        (
            "apply",
            &[&["<MODEL>", "--plan", "-o, --output", "--force", "--dry-run"]],
        ),
        ("eval", &[&["<MODEL>", "--plan", "--data"], &runtime]),
        (
            "probe",
            &[
                &[
                    "<MODEL>",
                    "--plan",
                    "--forget",
                    "--control",
                    "--also-variant",
                ],
                &runtime,
            ],
        ),
        (
            "sweep",
            &[
                &["<MODEL>", "--forget", "--retain", "--jobs", "--min-retain"],
                &weakening,
                &runtime,
            ],
        ),
        ("diff", &[&["<A>", "<B>"]]),
        (
            "check",
            &[&["<FOLDER>", "--policy", "--evidence", "--original", "junit"]],
        ),
        (
            "report",
            &[&[
                "<FOLDER>",
                "--evidence",
                "--plan",
                "--sweep",
                "-o, --output",
            ]],
        ),
        ("doctor", &[&runtime]),
        ("runtime", &[&["--install"], &runtime]),
    ];
    let overview = done(bare().arg("--help"));
    for (verb, groups) in expected {
        assert!(overview.contains(&format!("\n  {verb} ")), "{verb}");
        let help = done(bare().args([verb, "--help"]));
        let short = done(bare().args([verb, "-h"]));
        for flag in groups.iter().copied().flatten().chain(&["--format"]) {
            assert!(help.contains(flag), "{verb}: {flag}\n{help}");
            assert!(short.contains(flag), "{verb} -h: {flag}");
        }
        assert!(
            help.lines().all(|line| line.chars().count() <= 100),
            "{verb}"
        );
        // In words: the short one aligns its columns with spaces.
        let words = |text: &str| text.split_whitespace().count();
        assert!(words(&short) < words(&help) || groups.len() == 1, "{verb}");
    }
    assert_eq!(
        VERBS.map(|verb| expected.iter().any(|e| e.0 == verb)),
        [true; VERBS.len()]
    );
    for verb in ["weaken", "unlearn"] {
        let help = done(bare().args([verb, "--help"]));
        assert!(help.contains("inclusive range like 1-25") && help.contains("all"));
        assert!(help.contains("file, or shuffle"));
    }
}

#[test]
fn unknown_flags_verbs_and_values_are_errors() {
    for verb in VERBS {
        refuses(bare().args([verb, "--no-such-flag"]), &["--no-such-flag"]);
    }
    refuses(bare().arg("forget"), &["forget"]);
    refuses(
        bare().args(["inspect", "m", "--format", "xml"]),
        &["xml", "human", "json"],
    );
    refuses(bare().args(["inspect"]), &["<MODEL>"]);
    refuses(&mut bare(), &["Usage"]);

    let desk = Desk::new();
    for (flag, value, expected) in [
        ("--layers", "5-1", "expected first ≤ last"),
        ("--layers", "1..3", "an inclusive range like 1-25"),
        ("--order", "random", "random"),
        ("--device", "tpu", "auto, cpu, cuda or cuda:N"),
        ("--batch-size", "0", "expected a number ≥ 1"),
        ("--epochs", "0", "expected a number ≥ 1"),
        ("--seed", "many", "many"),
    ] {
        refuses(desk.unlearn(&MODEL).args([flag, value]), &[flag, expected]);
    }
    refuses(desk.collect(&MODEL).args(["--batch-size", "0"]), &["≥ 1"]);
    for gamma in ["0", "-1", "nan", "inf", "strong"] {
        let desk = Desk {
            gamma,
            ..Desk::new()
        };
        for mut command in [desk.unlearn(&MODEL), desk.weaken(&MODEL, Path::new("kc"))] {
            refuses(&mut command, &[gamma]);
        }
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    for arguments in [
        &["inspect", DEMO_MODEL, "--format", "json"][..],
        &["inspect", DEMO_MODEL],
        &["--help"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let Output { status, stderr, .. } = bare().args(arguments).stdout(writer).output().unwrap();
        assert_eq!(status.code(), Some(0), "{arguments:?} {}", text(&stderr));
        assert_eq!(text(&stderr), "", "{arguments:?}");
    }
}

const DEMO_MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/demo/model");

// ---- what the verbs give ---------------------------------------------------------------------------

fn keys(value: &Value) -> Vec<&str> {
    value
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect()
}

#[test]
fn inspect_lists_files_and_mlps_of_a_folder_and_of_a_single_file() {
    let folder = json(bare().args(["inspect", DEMO_MODEL]));
    assert_eq!(folder["layout"], "transformers-js");
    assert_eq!(folder["family"], "qwen2_vl");
    let files = folder["files"].as_array().unwrap();
    let roles: BTreeMap<&str, &str> = files
        .iter()
        .map(|file| {
            (
                file["path"].as_str().unwrap(),
                file["role"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(
        roles,
        BTreeMap::from([
            (DECODER, "decoder"),
            ("onnx/embed_tokens.onnx", "embed_tokens"),
            ("onnx/vision_encoder.onnx", "vision_encoder"),
        ])
    );
    let single = json(bare().arg("inspect").arg(MODEL.join(DECODER)));
    assert_eq!(
        (&single["layout"], &single["family"]),
        (&json!("single-file"), &Value::Null)
    );

    let decoder = files.iter().find(|file| file["path"] == DECODER).unwrap();
    for file in [decoder, &single["files"][0]] {
        let mlps = file["mlps"].as_array().unwrap();
        assert_eq!(mlps.len(), 6);
        for (layer, mlp) in mlps.iter().enumerate() {
            assert_eq!(
                keys(mlp),
                [
                    "layer", "tower", "d_ff", "d_model", "op", "weight", "dtype", "gated", "edit",
                    "graph", "cost", "reason"
                ]
            );
            let expected = json!({
                "layer": layer, "tower": "language", "d_ff": 512, "d_model": 128, "op": "MatMul",
                "weight": mlp["weight"], "dtype": "float", "gated": true, "edit": "columns",
                "graph": false, "cost": "none", "reason": null,
            });
            assert_eq!(*mlp, expected);
        }
    }
}

#[test]
fn every_verb_prints_json_with_a_version_and_keeps_standard_output_for_it() {
    let desk = Desk::new();
    let collected = json(desk.collect(&MODEL).arg("-vv"));
    assert_eq!(collected["samples"], 4);
    assert_eq!(collected["layers"], json!([0, 1, 2, 3, 4, 5]));
    let weakened = json(
        desk.weaken(&MODEL, Path::new("retain.kc"))
            .args(["--layers", "1-2", "-v"]),
    );
    assert_eq!(
        (&weakened["steps"], &weakened["layers"]),
        (&json!(3), &json!(2))
    );
    assert_eq!(weakened["of_neurons"], 2 * 512);
    let applied = json(&mut desk.apply(&MODEL, Path::new("forget.plan")));
    assert_eq!(applied["edits"].as_array().unwrap().len(), 2);
    let (plan, original) = (Path::new("forget.plan"), MODEL.as_path());
    let evaluated = json(desk.eval(original).arg("--plan").arg(plan));
    assert_eq!(evaluated["schema_version"], 2);
    assert_eq!(evaluated["sets"][0]["samples"], 3);
    let differ = json(desk.kvw().arg("diff").arg(original).arg("unlearned"));
    assert_eq!(differ["only_planned_ranges_changed"], true);
    assert_eq!(differ["changed"].as_array().unwrap().len(), 1);
    json(desk.kvw().args(["runtime", "--offline"]));
    json(desk.kvw().args(["doctor", "--offline", "--device", "cpu"]));
    fs::remove_dir_all(desk.work.join("unlearned")).unwrap();
    let unlearned = json(desk.unlearn(original).args(["--eval-limit", "1"]));
    let evaluation = &unlearned["evaluation"];
    assert_eq!(evaluation["agreement"]["same_argmax"], 1.0);
    assert_eq!(evaluation["sets"].as_array().unwrap().len(), 2);
    // The receipt holds the numbers and the digest of the evaluation, and nothing in clear text.
    let receipt = fs::read(desk.work.join("unlearned/kvw.json")).unwrap();
    let receipt: Value = serde_json::from_slice(&receipt).unwrap();
    assert_eq!(&receipt["evaluation"], evaluation);
    let evidence = kvw::eval::Evidence::read(&desk.work.join("unlearned.evaluation.json"));
    let (evidence, digest) = evidence.unwrap();
    assert_eq!(evaluation["evidence_sha256"], digest.to_string());
    let answer = &evidence.sets[0].models[&kvw::eval::Role::Before].answers[0].answered;
    let text = receipt.to_string();
    for clear in [
        &answer.question,
        &answer.reference,
        answer.name.as_ref().unwrap(),
    ] {
        assert!(!text.contains(clear.as_str()), "{clear}");
    }
}

#[test]
fn ranges_of_layers_are_inclusive_and_those_that_the_model_lacks_are_refused() {
    let desk = Desk::new();
    let of_neurons = |layers: &str| {
        let mut command = desk.weaken(&MODEL, &made().coefficients);
        json(command.args(["--force", "--layers", layers]))["of_neurons"].clone()
    };
    assert_eq!(
        ["all", "1-3", "4"].map(of_neurons),
        [json!(6 * 512), json!(3 * 512), json!(512)]
    );
    for layers in ["3-9", "9", "6-6"] {
        for command in [
            &mut desk.collect(&MODEL),
            desk.weaken(&MODEL, &made().coefficients).arg("--force"),
            &mut desk.unlearn(&MODEL),
        ] {
            let expected = ["expected layers", "found layers 0-5", "hint: `kvw inspect`"];
            refuses(command.args(["--layers", layers]), &expected);
        }
    }
}

#[test]
fn a_seed_fixes_the_shuffle() {
    let desk = Desk::new();
    let plan = |order: &str, seed: &str| {
        let mut command = desk.weaken(&MODEL, &made().coefficients);
        done(command.args(["--force", "--order", order, "--seed", seed]));
        fs::read(desk.work.join("forget.plan")).unwrap()
    };
    let [one, again, file, file_again] = [
        ("shuffle", "1"),
        ("shuffle", "1"),
        ("file", "1"),
        ("file", "2"),
    ]
    .map(|(order, seed)| plan(order, seed));
    assert!(one == again);
    assert!(file == file_again);
    let others = ["2", "3", "4", "5"].map(|seed| plan("shuffle", seed) != one);
    assert!(others.contains(&true), "the seed does nothing");
}

#[test]
fn the_chain_of_verbs_gives_the_bytes_of_one_unlearn_run_and_the_same_ones_twice() {
    let desks = [Desk::new(), Desk::new()];
    // Coefficients and plans name the sets that they were made from by content, not by path.
    let trees = desks.each_ref().map(|desk| {
        let (original, plan) = (MODEL.as_path(), Path::new("forget.plan"));
        done(&mut desk.collect(original));
        done(&mut desk.weaken(original, Path::new("retain.kc")));
        done(&mut desk.apply(original, plan));
        let said = done(desk.kvw().arg("diff").arg(original).arg("unlearned"));
        assert!(
            said.contains("only the planned ranges changed, and all of them"),
            "{said}"
        );
        done(&mut desk.eval(Path::new("unlearned")));
        fs::rename(desk.work.join("unlearned"), desk.work.join("by-verbs")).unwrap();
        done(desk.unlearn(original).args([
            "--plan",
            "whole.plan",
            "--eval-limit",
            "2",
            "--max-new-tokens",
            "5",
        ]));
        let found = tree(&desk.work);
        assert!(found[plan] == found[Path::new("whole.plan")]);
        assert!(desk.work.join("unlearned.evaluation.json").is_file());
        let mut whole = tree(&desk.work.join("unlearned"));
        let mut by_verbs = tree(&desk.work.join("by-verbs"));
        // `unlearn` also evaluates, and says so in the receipt.
        let [whole_receipt, receipt] = [&mut whole, &mut by_verbs].map(|folder| {
            let bytes = folder.remove(Path::new("kvw.json")).unwrap().unwrap();
            serde_json::from_slice::<Value>(&bytes).unwrap()
        });
        let mut without = whole_receipt.clone();
        assert!(
            without
                .as_object_mut()
                .unwrap()
                .remove("evaluation")
                .is_some()
        );
        assert_eq!(without, receipt);
        assert!(by_verbs == whole, "the folders differ");
        assert!(by_verbs[Path::new(DECODER)] != tree(original)[Path::new(DECODER)]);
        found
    });
    let [first, second] = &trees;
    assert_eq!(
        first.keys().collect::<Vec<_>>(),
        second.keys().collect::<Vec<_>>()
    );
    for (path, bytes) in first {
        assert!(second[path] == *bytes, "{} differs", path.display());
    }
}

#[test]
fn a_plan_evaluates_as_the_model_that_it_makes() {
    let desk = Desk::new();
    let answers = |command: &mut Command| json(command.arg("--answers"))["sets"].clone();
    done(&mut desk.apply(&MODEL, &made().plan));
    let planned = answers(desk.eval(&MODEL).arg("--plan").arg(&made().plan));
    let written = answers(&mut desk.eval(Path::new("unlearned")));
    let texts = |sets: &Value| -> Vec<Value> {
        let answers = sets[0]["models"]["model"]["answers"].as_array().unwrap();
        answers.iter().map(|a| a["prediction"].clone()).collect()
    };
    assert_eq!(texts(&planned), texts(&written));
    let loss = |sets: &Value| {
        sets[0]["models"]["model"]["summary"]["loss"]["value"]
            .as_f64()
            .unwrap()
    };
    assert!((loss(&planned) - loss(&written)).abs() < 1e-4);
    assert_ne!(answers(&mut desk.eval(&MODEL)), planned);
}

#[test]
fn the_vision_encoder_is_weakened_on_request_and_by_no_accident() {
    let desk = Desk::new();
    const VISION: &str = "onnx/vision_encoder.onnx";
    let collected = json(desk.collect(&MODEL).args(["--tower", "vision"]));
    assert_eq!(collected["layers"], json!(["vision.0", "vision.1"]));
    let own = desk.work.join("retain.kc");
    // What was measured of one tower says nothing about the other.
    for (coefficients, tower, missing) in [
        (&made().coefficients, "vision", "found [vision.0, vision.1]"),
        (&made().coefficients, "all", "layer vision.0"),
        (&own, "language", "expected layers [vision.0, vision.1]"),
    ] {
        let mut command = desk.weaken(&MODEL, coefficients);
        refuses(command.args(["--tower", tower]), &["expected", missing]);
    }
    refuses(
        desk.weaken(&MODEL, &own)
            .args(["--tower", "vision", "--layers", "0-5"]),
        &["expected layers 0-5", "found vision layers 0-1"],
    );
    refuses(
        desk.weaken(&MODEL, &own).args(["--tower", "both"]),
        &["--tower", "expected language, vision or all"],
    );
    // A question without a picture shows the vision encoder nothing.
    let text = write_rows(&desk.inputs.join("text.jsonl"), &rows("forget_text", 1));
    let mut command = desk.kvw();
    command.arg("collect").arg(MODEL.as_path()).arg("--data");
    command
        .arg(&text)
        .args(["-o", "text.kc", "--tower", "vision"]);
    refuses(
        &mut command,
        &["expected a picture, found none", "--tower language or all"],
    );

    let plan = desk.work.join("forget.plan");
    done(desk.weaken(&MODEL, &own).args(["--tower", "vision"]));
    let losses = |command: &mut Command| {
        json(command)["sets"][0]["models"]["model"]["summary"]["loss"]["value"]
            .as_f64()
            .unwrap()
    };
    let untouched = losses(&mut desk.eval(&MODEL));
    let planned = losses(desk.eval(&MODEL).arg("--plan").arg(&plan));
    let said = done(&mut desk.apply(&MODEL, &plan));
    assert!(
        said.contains("columns: layers vision.0, vision.1"),
        "{said}"
    );
    assert!(!said.contains(DECODER), "{said}");
    let written = losses(&mut desk.eval(Path::new("unlearned")));
    assert!((planned - written).abs() < 1e-4, "{planned} {written}");
    assert!((planned - untouched).abs() > 1e-2, "{planned} {untouched}");
    for (path, bytes) in tree(&MODEL) {
        let there = fs::read(desk.work.join("unlearned").join(&path)).ok();
        assert_eq!(
            there == bytes,
            path != Path::new(VISION),
            "{}",
            path.display()
        );
    }
    let mut diff = desk.kvw();
    diff.arg("diff").arg(MODEL.as_path()).arg("unlearned");
    assert_eq!(json(&mut diff)["only_planned_ranges_changed"], json!(true));
    refuses(&mut desk.apply(Path::new("unlearned"), &plan), &["already"]);

    // All at once, on both, and verified.
    let desk = Desk::new();
    let unlearned = json(
        desk.unlearn(&MODEL)
            .args(["--tower", "all", "--eval-limit", "1"]),
    );
    assert_eq!(unlearned["parameters"]["tower"], "all");
    assert_eq!(unlearned["plan"]["layers"], 8);
    let receipt = read_json(&desk.work.join("unlearned/kvw.json"));
    let files = receipt["files"].as_array().unwrap();
    let files: Vec<&str> = files
        .iter()
        .map(|file| file["path"].as_str().unwrap())
        .collect();
    assert_eq!(files, [DECODER, VISION]);
    let policy = desk.inputs.join("policy.toml");
    fs::write(&policy, "version = 1\n").unwrap();
    let mut check = desk.kvw();
    check
        .arg("check")
        .arg("unlearned")
        .arg("--policy")
        .arg(&policy);
    check.arg("--original").arg(MODEL.as_path());
    done(&mut check);
}

// ---- outputs ---------------------------------------------------------------------------------------

#[test]
fn a_dry_run_writes_nothing() {
    let desk = Desk::new();
    let mut command = desk.apply(&MODEL, &made().plan);
    let said = done(command.arg("--dry-run"));
    assert!(
        said.contains("dry run: nothing was written to unlearned"),
        "{said}"
    );
    assert!(said.contains(DECODER), "{said}");
    assert_eq!(tree(&desk.work).len(), 0);
}

/// A plan that halves every knowledge vector of `model`, in a file.
fn halving_plan(model: &Path, file: &Path) -> PathBuf {
    let bundle = Bundle::open(model).unwrap();
    let decoder = bundle.components(None).unwrap().decoder;
    let identity = kvw::edit::identity_of(&bundle, decoder).unwrap();
    let plan = kvw::kvw::Plan {
        gates: (identity.layers.iter())
            .map(|layer| (layer.layer, vec![0.5; layer.d_ff.try_into().unwrap()]))
            .collect(),
        rule: "kvw".into(),
        parameters: Value::Null,
        steps: 1,
    };
    kvw::kvw::save_plan(file, &plan, json!({"model": identity}), false).unwrap();
    file.to_owned()
}

#[test]
fn the_form_of_an_edit_is_the_one_that_was_asked_for_and_said() {
    let plan = &made().plan;
    for (choice, form, line) in [
        (
            "auto",
            "columns",
            "columns: layers 0, 1, 2, 3, 4, 5; costs nothing at inference",
        ),
        (
            "columns",
            "columns",
            "columns: layers 0, 1, 2, 3, 4, 5; costs nothing at inference",
        ),
        (
            "scales",
            "scales",
            "scales: layers 0, 1, 2, 3, 4, 5; costs nothing at inference",
        ),
        (
            "mul",
            "mul",
            "mul, in the graph: layers 0, 1, 2, 3, 4, 5; costs one Mul of d_ff values per token at inference",
        ),
    ] {
        let desk = Desk::new();
        let mut command = desk.apply(&MODEL, plan);
        let said = done(command.args(["--edit", choice, "--dry-run"]));
        assert!(said.contains(line), "{choice}\n{said}");
        assert_eq!(tree(&desk.work).len(), 0, "{choice}");
        let said = done(desk.apply(&MODEL, plan).args(["--edit", choice]));
        assert!(said.contains(line), "{choice}\n{said}");
        let receipt = read_json(&desk.work.join("unlearned/kvw.json"));
        let edits = receipt["edits"].as_array().unwrap();
        assert_eq!(edits.len(), 6, "{choice}");
        for edit in edits {
            assert_eq!(edit["form"], form, "{choice}");
            assert_eq!(edit["graph"], form == "mul", "{choice}");
        }
        let len = |folder: &Path| fs::metadata(folder.join(DECODER)).unwrap().len();
        let grown = len(&desk.work.join("unlearned")) > len(&MODEL);
        assert_eq!(grown, form == "mul", "{choice}");
    }
}

#[test]
fn a_form_that_does_not_fit_every_file_is_refused_with_file_layer_and_reason() {
    let desk = Desk::new();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/edits/qwen2_vl");
    let plan = halving_plan(&model, &desk.inputs.join("halves.plan"));
    let refused = refuses(
        desk.apply(&model, &plan).args(["--edit", "columns"]),
        &[
            "onnx/decoder_model_merged_bnb4.onnx",
            "layer 0",
            "columns: ",
        ],
    );
    assert!(
        !refused.contains("mul: "),
        "only the form that was asked for\n{refused}"
    );
    let auto = done(desk.apply(&model, &plan).args(["--edit", "auto"]));
    for line in [
        "columns: layers 0, 1, 2; costs nothing",
        "scales: layers 0, 1, 2; costs nothing",
        "scales, in the graph: layers 0, 1, 2; costs nothing",
    ] {
        assert!(auto.contains(line), "{auto}");
    }
    for verb in ["apply", "unlearn"] {
        let mut command = match verb {
            "apply" => desk.apply(&model, &plan),
            _ => desk.unlearn(&model),
        };
        command.args(["--edit", "rows"]);
        fails(
            2,
            &mut command,
            &["--edit", "expected auto, columns, scales or mul"],
        );
    }
}

#[test]
fn an_existing_output_is_refused_without_force_and_replaced_with_it() {
    let desk = Desk::new();
    let commands: [(&str, &dyn Fn() -> Command); 3] = [
        ("retain.kc", &|| desk.collect(&MODEL)),
        ("forget.plan", &|| desk.weaken(&MODEL, &made().coefficients)),
        ("whole.plan", &|| {
            let mut command = desk.unlearn(&MODEL);
            command.args(["--plan", "whole.plan", "--eval-limit", "0"]);
            command
        }),
    ];
    for (output, command) in commands {
        let path = desk.work.join(output);
        fs::write(&path, "precious").unwrap();
        let expected = [output, "already exists", "hint: ", "--force"];
        refuses(&mut command(), &expected);
        done(command().arg("--force"));
        assert!(fs::read(&path).unwrap().len() > 1000);
    }
    // The unlearn run left a folder.
    let before = fs::read(desk.work.join("unlearned").join(DECODER)).unwrap();
    for mut command in [desk.apply(&MODEL, &made().plan), desk.unlearn(&MODEL)] {
        refuses(
            &mut command,
            &["unlearned", "already exists", "hint: ", "--force"],
        );
    }
    done(desk.apply(&MODEL, &made().plan).arg("--force"));
    assert!(fs::read(desk.work.join("unlearned").join(DECODER)).unwrap() == before);

    // Force is for what the tool wrote.
    let foreign = desk.work.join("unlearned");
    fs::remove_dir_all(&foreign).unwrap();
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("thesis.txt"), "precious").unwrap();
    for mut command in [desk.apply(&MODEL, &made().plan), desk.unlearn(&MODEL)] {
        refuses(
            command.arg("--force"),
            &["unlearned", "will not replace", "hint: "],
        );
    }
}

#[test]
fn an_output_in_a_folder_that_is_missing_is_refused_before_any_work() {
    let desk = Desk::new();
    for mut command in [
        desk.collect(&MODEL),
        desk.weaken(&MODEL, &made().coefficients),
        desk.apply(&MODEL, &made().plan),
        desk.unlearn(&MODEL),
    ] {
        let mut arguments: Vec<OsString> = command.get_args().map(OsStr::to_owned).collect();
        let at = arguments.iter().position(|a| a == "-o").unwrap();
        arguments[at + 1] = "missing/out".into();
        // Refused before ONNX Runtime is looked for.
        command = bare();
        command.current_dir(&desk.work).args(arguments);
        refuses(
            &mut command,
            &["missing", "does not exist", "hint: mkdir -p missing"],
        );
    }
}

#[test]
fn an_output_inside_the_model_folder_is_refused_before_any_work() {
    let desk = Desk::new();
    let model = model_copy(&desk.work);
    // Refused before ONNX Runtime is looked for.
    let mut command = bare();
    command.current_dir(&desk.work).arg("unlearn").arg(&model);
    command.arg("--forget").arg(&desk.forget);
    command.arg("--retain").arg(&desk.retain);
    refuses(
        command.args(["-o", "model/unlearned"]),
        &["model/unlearned", "hint: "],
    );
}

#[test]
fn the_forget_set_given_as_the_retain_set_is_refused() {
    let mut desk = Desk::new();
    desk.retain = desk.forget.clone();
    let expected = ["forget.jsonl", "found the same file", "hint: "];
    refuses(&mut desk.unlearn(&MODEL), &expected);
}

#[test]
fn a_model_that_does_not_fit_on_the_disk_is_refused() {
    let desk = Desk::new();
    let model = model_copy(&desk.inputs);
    let huge = fs::File::create(model.join("other_weights.bin")).unwrap();
    let room = kvw::files::available_bytes(&desk.work).unwrap();
    if let Err(e) = huge.set_len(room + (1 << 40)) {
        println!("skipped: no sparse file of that size ({e})");
        return;
    }
    let expected = [
        "not enough room for",
        "unlearned",
        "bytes needed",
        "hint: free at least",
    ];
    refuses(&mut desk.apply(&model, &made().plan), &expected);
    refuses(&mut desk.unlearn(&model), &expected);
}

#[test]
fn a_disk_that_is_full_leaves_nothing_behind() {
    let desk = Desk::new();
    // A file system of 16 KiB, in a mount namespace of the command's own.
    let script = "mount -t tmpfs -o size=16k none \"$1\" || exit 77; cd \"$1\"; shift; \
                  \"$@\"; code=$?; [ -z \"$(ls -A)\" ] || exit 78; exit $code";
    let command = desk.collect(&MODEL);
    let mut confined = Command::new("unshare");
    confined
        .args(["-rm", "sh", "-c", script, "sh"])
        .arg(&desk.work)
        .arg(command.get_program())
        .args(command.get_args())
        .env("ORT_DYLIB_PATH", library())
        .env("KVW_CACHE_DIR", &desk.inputs);
    match confined.output() {
        Ok(output) if output.status.code() == Some(2) && output.stdout.is_empty() => {
            let stderr = text(&output.stderr);
            let expected = [
                "cannot write retain.kc",
                "not enough room for",
                "hint: free some room",
            ];
            assert!(
                expected.iter().all(|part| stderr.contains(part)),
                "{stderr}"
            );
        }
        Ok(output) if matches!(output.status.code(), Some(1 | 77)) => {
            println!(
                "skipped: no mount namespaces here: {}",
                text(&output.stderr)
            );
        }
        Err(e) => println!("skipped: no unshare ({e})"),
        Ok(output) => panic!("{output:?}"),
    }
}

// ---- bad models ------------------------------------------------------------------------------------

#[test]
fn files_that_are_missing_are_named() {
    let desk = Desk::new();
    let nothing = Path::new("nothing");
    let named = ["nothing", "No such file", "hint: check the path"];
    for mut command in on_model(&desk, nothing)
        .into_iter()
        .chain(on_data(&desk, nothing))
    {
        refuses(&mut command, &named);
    }
    refuses(&mut desk.apply(&MODEL, nothing), &named);
    refuses(&mut desk.weaken(&MODEL, nothing), &named);
    refuses(desk.eval(&MODEL).arg("--plan").arg(nothing), &named);
    refuses(desk.kvw().args(["diff", DEMO_MODEL, "nothing"]), &named);
    refuses(desk.kvw().args(["diff", "nothing", DEMO_MODEL]), &named);
}

#[test]
fn a_model_folder_without_one_of_its_files_says_which() {
    let desk = Desk::new();
    for (file, verb) in [
        ("onnx/embed_tokens.onnx", "collect"),
        ("onnx/vision_encoder.onnx", "collect"),
        (DECODER, "apply"),
        ("tokenizer.json", "collect"),
        ("chat_template.jinja", "collect"),
        ("config.json", "collect"),
    ] {
        let model = model_copy(&desk.inputs);
        fs::remove_file(model.join(file)).unwrap();
        let mut command = match verb {
            "apply" => desk.apply(&model, &made().plan),
            _ => desk.collect(&model),
        };
        let name = Path::new(file).file_stem().unwrap().to_str().unwrap();
        let name = name.replace("vision_encoder", "vision encoder");
        refuses(&mut command, &[&name, model.to_str().unwrap(), "hint: "]);
    }
}

#[test]
fn a_truncated_file_is_refused_with_its_name_and_the_byte() {
    let desk = Desk::new();
    for (file, size) in [
        (DECODER, 3_000_000),
        (DECODER, 17),
        ("onnx/embed_tokens.onnx", 10_000),
    ] {
        let model = model_copy(&desk.inputs);
        let path = model.join(file);
        fs::File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(size)
            .unwrap();
        for mut command in on_model(&desk, &model) {
            let size = format!("of {size}");
            let expected = [
                file,
                "not a whole ONNX file",
                "at byte",
                &size,
                "hint: ",
                "truncated",
            ];
            refuses(&mut command, &expected);
        }
    }
    let model = model_copy(&desk.inputs);
    fs::write(model.join(DECODER), "").unwrap();
    for mut command in on_model(&desk, &model) {
        refuses(&mut command, &[DECODER, "expected an ONNX model", "hint: "]);
    }
}

#[test]
fn external_data_that_is_missing_is_refused() {
    let desk = Desk::new();
    let model = model_copy(&desk.inputs);
    let (_, tensor) = externalize(&model, "weights.bin");
    for mut command in on_weights(&desk, &model) {
        let expected = [DECODER, &tensor, "weights.bin", "no such file", "hint: "];
        refuses(&mut command, &expected);
    }
}

#[test]
fn external_data_that_is_too_short_is_refused() {
    let desk = Desk::new();
    let model = model_copy(&desk.inputs);
    let (bytes, tensor) = externalize(&model, "weights.bin");
    let (whole, cut) = (model.join("onnx/weights.bin"), bytes.len() - 4);
    fs::write(&whole, &bytes).unwrap();
    done(desk.kvw().arg("inspect").arg(&model));
    fs::write(&whole, &bytes[..cut]).unwrap();
    for mut command in on_weights(&desk, &model) {
        let (end, size) = (format!("..{}", bytes.len()), format!("has {cut} bytes"));
        let expected = [DECODER, &tensor, "weights.bin", &end, &size, "hint: "];
        refuses(&mut command, &expected);
    }
}

#[test]
fn external_data_that_leads_out_of_the_folder_is_refused() {
    let desk = Desk::new();
    let outside = desk.inputs.join("outside.bin");
    fs::write(&outside, vec![0; 512 * 128 * 4]).unwrap();
    for location in ["../../outside.bin", outside.to_str().unwrap(), "link.bin"] {
        let model = model_copy(&desk.inputs);
        let (_, tensor) = externalize(&model, location);
        let link = model.join("onnx/link.bin");
        let _ = fs::remove_file(&link);
        if location == "link.bin" {
            std::os::unix::fs::symlink(&outside, link).unwrap();
        }
        for mut command in on_weights(&desk, &model) {
            let name = match location {
                "link.bin" => "leads out of",
                _ => tensor.as_str(),
            };
            refuses(&mut command, &[name, location, "hint: "]);
        }
        fs::remove_dir_all(&model).unwrap();
    }
}

#[test]
fn what_was_made_for_another_model_is_refused() {
    let desk = Desk::new();
    let other = model_copy(&desk.inputs);
    let down = down_projections(&other);
    edit_decoder(&other, |tensors| {
        let bytes = named(tensors, &down[0]).raw_data.take();
        let swapped = std::mem::replace(&mut named(tensors, &down[1]).raw_data, bytes);
        named(tensors, &down[0]).raw_data = swapped;
    });
    let made = made();
    let different = ["layer 0", "expected", "found", "hint: "];
    let by_plan = refuses(&mut desk.apply(&other, &made.plan), &different);
    assert!(by_plan.contains(DECODER), "{by_plan}");
    let by_coefficients = refuses(&mut desk.weaken(&other, &made.coefficients), &different);
    assert!(by_coefficients.contains("retain.kc was made for another model"));
    refuses(desk.eval(&other).arg("--plan").arg(&made.plan), &different);

    // Another kind of file, or a damaged one.
    let plan = [
        "expected format kvw-plan",
        "found kvw-coefficients",
        "hint: ",
    ];
    refuses(&mut desk.apply(&MODEL, &made.coefficients), &plan);
    let coefficients = [
        "expected format kvw-coefficients",
        "found kvw-plan",
        "hint: ",
    ];
    refuses(&mut desk.weaken(&MODEL, &made.plan), &coefficients);
    let bytes = fs::read(&made.plan).unwrap();
    let damaged = desk.inputs.join("damaged.plan");
    for cut in [0, 7, 100, bytes.len() - 1] {
        fs::write(&damaged, &bytes[..cut]).unwrap();
        refuses(
            &mut desk.apply(&MODEL, &damaged),
            &["damaged.plan", "expected", "hint: "],
        );
    }
}

#[test]
fn a_plan_is_not_applied_twice() {
    let desk = Desk::new();
    done(&mut desk.apply(&MODEL, &made().plan));
    let applied = desk.inputs.join("applied");
    fs::rename(desk.work.join("unlearned"), &applied).unwrap();
    refuses(&mut desk.apply(&applied, &made().plan), &["hint: "]);
}

#[test]
fn a_non_finite_activation_ends_the_run_with_its_place() {
    let desk = Desk::new();
    let model = model_copy(&desk.inputs);
    // The first weight of shape [d_model, d_ff] is layer 0's gate or up projection; its columns are
    // neurons.
    edit_decoder(&model, |tensors| {
        let tensor = tensors.iter_mut().find(|t| t.dims == [128, 512]).unwrap();
        let mut bytes = tensor.raw_data.take().unwrap().to_vec();
        bytes[4 * 7..4 * 8].copy_from_slice(&f32::INFINITY.to_le_bytes());
        tensor.raw_data = Some(bytes.into());
    });
    let sample = rows("retain", 1)[0]["id"].as_str().unwrap().to_owned();
    let expected = [
        sample.as_str(),
        "layer 0, neuron 7",
        "expected a finite activation, found",
        "hint: ",
    ];
    refuses(&mut desk.collect(&model), &expected);
    refuses(&mut desk.unlearn(&model), &expected);
}

#[test]
fn a_run_that_weakens_nothing_fails_and_saves_nothing() {
    let desk = Desk {
        gamma: "1e-12",
        ..Desk::new()
    };
    let expected = ["nothing was weakened: after 3 steps", "hint: raise --gamma"];
    fails(1, &mut desk.weaken(&MODEL, &made().coefficients), &expected);
    fails(1, &mut desk.unlearn(&MODEL), &expected);
}

// ---- bad data --------------------------------------------------------------------------------------

#[test]
fn a_bad_row_is_named_by_file_and_line() {
    let desk = Desk::new();
    let good = rows("retain", 1).remove(0);
    let with = |field: &str, value: Value| {
        let mut row = good.clone();
        row["id"] = json!("second");
        row[field] = value;
        row.to_string()
    };
    let path = desk.inputs.join("rows.jsonl");
    let cases: [(String, &[&str]); 7] = [
        (
            r#"{"question": "Who?", "answer""#.into(),
            &["not valid JSON", "one whole JSON object"],
        ),
        (
            with("image", json!("nobody.png")),
            &["`second`", "nobody.png does not exist"],
        ),
        (
            with("answer", json!(" \n")),
            &["`second`", "the answer is empty"],
        ),
        (
            with("answer", json!(7)),
            &["`answer`", "expected a string, found a number"],
        ),
        (
            with("question", Value::Null),
            &["`question`", "expected a string, found null"],
        ),
        (
            with("facts", json!({"job": 1})),
            &["`facts.job`", "expected a string"],
        ),
        (with("id", good["id"].clone()), &["already used on line 1"]),
    ];
    for (row, expected) in cases {
        fs::write(&path, format!("{good}\n\n{row}\n")).unwrap();
        for mut command in on_data(&desk, &path) {
            let said = refuses(&mut command, &["rows.jsonl:3: ", "hint: "]);
            assert!(
                expected.iter().all(|part| said.contains(part)),
                "{expected:?}\n{said}"
            );
        }
    }
    fs::write(&path, "\n \n").unwrap();
    for mut command in on_data(&desk, &path) {
        refuses(&mut command, &["rows.jsonl", "holds no sample", "hint: "]);
    }
}

#[test]
fn an_image_that_is_none_is_named_with_its_sample() {
    let desk = Desk::new();
    let mut data = rows("retain", 2);
    fs::write(desk.inputs.join("text.png"), "no image").unwrap();
    data[1]["image"] = json!("text.png");
    let path = write_rows(&desk.inputs.join("rows.jsonl"), &data);
    for mut command in on_data(&desk, &path) {
        let sample = format!("`{}`", data[1]["id"].as_str().unwrap());
        let expected = [
            "text.png",
            &sample,
            "expected a PNG, JPEG or WebP image",
            "hint: ",
        ];
        refuses(&mut command, &expected);
    }
}

#[test]
fn an_answer_that_the_chat_template_changes_is_refused() {
    let desk = Desk::new();
    let model = model_copy(&desk.inputs);
    let template = model.join("chat_template.jinja");
    let text = fs::read_to_string(&template).unwrap();
    let shouting = text.replace("{{ content['text'] }}", "{{ content['text'] | upper }}");
    assert_ne!(text, shouting);
    fs::write(&template, shouting).unwrap();
    let sample = |set: &str| format!("`{}`", rows(set, 1)[0]["id"].as_str().unwrap());
    for (mut command, set) in [
        (desk.collect(&model), "retain"),
        (desk.weaken(&model, &made().coefficients), "forget"),
        (desk.unlearn(&model), "forget"),
        (desk.eval(&model), "forget"),
    ] {
        let expected = [
            "answer not in the prompt",
            &sample(set),
            "hint: the chat template",
        ];
        refuses(&mut command, &expected);
    }
}

// ---- ONNX Runtime ----------------------------------------------------------------------------------

#[test]
fn without_onnx_runtime_the_places_and_the_ways_out_are_listed() {
    let desk = Desk::new();
    let empty = desk.inputs.join("cache");
    let alone = |command: Command| {
        let mut alone = bare();
        alone.current_dir(&desk.work).args(command.get_args());
        alone
            .env("PATH", "/nonexistent")
            .env("KVW_CACHE_DIR", &empty);
        alone
    };
    let mut runtime = desk.kvw();
    runtime.arg("runtime");
    let mut runtime = alone(runtime);
    if runtime.arg("--offline").output().unwrap().status.success() {
        println!("skipped: the system's loader finds an ONNX Runtime");
        return;
    }
    for command in [
        desk.collect(&MODEL),
        desk.weaken(&MODEL, &made().coefficients),
        desk.unlearn(&MODEL),
        desk.eval(&MODEL),
    ] {
        let expected = [
            "no ONNX Runtime 1.19.0 or newer found, and fetching is off (--offline)",
            "--ort-lib: not given",
            "ORT_DYLIB_PATH: not given",
            "the cache: nothing there",
            "Python: no interpreter on PATH",
            "hint: pip install onnxruntime",
        ];
        refuses(alone(command).arg("--offline"), &expected);
    }
    let expected = ["could not be fetched", "no working pip", "hint: "];
    refuses(&mut alone(desk.collect(&MODEL)), &expected);
    assert!(!empty.exists() || tree(&empty).values().all(Option::is_none));

    // Neither inspect nor apply nor diff needs one.
    done(&mut alone({
        let mut command = desk.kvw();
        command.args(["inspect", DEMO_MODEL]);
        command
    }));
    done(&mut alone(desk.apply(&MODEL, &made().plan)));
    let mut diff = desk.kvw();
    diff.args(["diff", DEMO_MODEL, "unlearned"]);
    done(&mut alone(diff));
}

/// A library that says it is ONNX Runtime 1.18.0; `None` where there is no C compiler.
fn old_library(folder: &Path) -> Option<PathBuf> {
    let (code, library) = (
        folder.join("old.c"),
        folder.join("libonnxruntime.so.1.18.0"),
    );
    let source = "static const void *api(unsigned v) { (void)v; return 0; }
         static const char *version(void) { return \"1.18.0\"; }
         static const struct { const void *(*a)(unsigned); const char *(*v)(void); } base = { api, version };
         const void *OrtGetApiBase(void) { return &base; }";
    fs::write(&code, source).unwrap();
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&code);
    match cc.status() {
        Ok(status) => {
            assert!(status.success());
            Some(library)
        }
        Err(e) => {
            println!("skipped: no C compiler ({e})");
            None
        }
    }
}

#[test]
fn an_onnx_runtime_that_is_too_old_is_refused_with_both_versions() {
    let desk = Desk::new();
    let Some(old) = old_library(&desk.inputs) else {
        return;
    };
    for mut command in [
        desk.collect(&MODEL),
        desk.unlearn(&MODEL),
        desk.eval(&MODEL),
    ] {
        let expected = [
            old.to_str().unwrap(),
            "is ONNX Runtime 1.18.0, expected 1.19.0 or newer",
            "hint: pip install -U onnxruntime",
        ];
        refuses(command.arg("--ort-lib").arg(&old), &expected);
    }
    let missing = ["no.so (--ort-lib) does not exist", "hint: "];
    let missing = [
        missing[0].replace("no.so", "`no.so`"),
        missing[1].to_owned(),
    ];
    let missing = missing.each_ref().map(String::as_str);
    refuses(desk.collect(&MODEL).args(["--ort-lib", "no.so"]), &missing);
}

#[test]
fn cuda_that_was_asked_for_and_is_absent_is_an_error() {
    let desk = Desk::new();
    let provider = "libonnxruntime_providers_cuda.so";
    if library().with_file_name(provider).exists() {
        println!("skipped: the ONNX Runtime at hand has CUDA");
        return;
    }
    for (mut command, device) in [
        (desk.collect(&MODEL), "cuda"),
        (desk.unlearn(&MODEL), "cuda:0"),
        (desk.eval(&MODEL), "cuda:1"),
    ] {
        let expected = ["--device cuda:", "was built without CUDA", "hint: "];
        refuses(command.args(["--device", device]), &expected);
    }
    // Asked softly, it runs on the CPU.
    done(desk.collect(&MODEL).args(["--device", "auto"]));
}

// ---- sweep -----------------------------------------------------------------------------------------

fn sweep(folder: &Path, gammas: &str, layers: &str) -> Command {
    let mut command = kvw(folder);
    command.args(["sweep", &format!("{DEMO}/model"), "--eval-limit", "3"]);
    command.args(["--threads", "1"]);
    command.args(["--forget", &format!("{DEMO}/data/forget.jsonl")]);
    command.args(["--retain", &format!("{DEMO}/data/retain_heldout.jsonl")]);
    command.args(["--gamma", gammas, "--layers", layers, "-o", "sweep.json"]);
    command
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_sweep_goes_on_where_it_stopped_and_ends_as_if_it_never_had() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("sweep.json");
    done(&mut sweep(folder.path(), "0.4,0.05", "0-2"));
    let bytes = fs::read(&file).unwrap();
    let written = read_json(&file);
    let gammas: Vec<f64> = written["points"]
        .as_array()
        .unwrap()
        .iter()
        .map(|point| point["parameters"]["gamma"].as_f64().unwrap())
        .collect();
    assert_eq!(gammas, [0.05, 0.4]);
    assert!(written["pick"]["rule"].as_str().unwrap().contains("0.95"));

    // Killed after its first point: only the other is run, and two at a time give the same bytes.
    for jobs in ["1", "2"] {
        let mut killed = written.clone();
        killed["points"].as_array_mut().unwrap().pop();
        fs::write(&file, serde_json::to_vec(&killed).unwrap()).unwrap();
        let output = sweep(folder.path(), "0.4,0.05", "0-2")
            .args(["--jobs", jobs])
            .output()
            .unwrap();
        let told = text(&output.stderr);
        assert!(told.contains("2 of 2: gamma 0.4"), "{told}");
        assert!(!told.contains("gamma 0.05, layers"), "{told}");
        assert!(output.status.success());
        assert_eq!(text(&fs::read(&file).unwrap()), text(&bytes));
    }

    // The same sweep on other data, and a file that is no sweep.
    let refused = |command: &mut Command, complaint: &str| {
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        let told = text(&output.stderr);
        assert!(told.contains(complaint), "{told}");
    };
    refused(
        sweep(folder.path(), "0.4", "0-2").args(["--epochs", "2"]),
        "its points belong to another epochs: expected 2, found 1",
    );
    refused(
        &mut sweep(folder.path(), "0.4", "0-9"),
        "expected layers 0-9",
    );
    refused(
        sweep(folder.path(), "0.4", "0-2").args(["--metric", "beauty"]),
        "cannot choose by beauty of the forget set: there is no such metric",
    );
    assert_eq!(text(&fs::read(&file).unwrap()), text(&bytes));
    fs::write(&file, b"{\"format\": \"kvw-plan\", \"schema_version\": 1}").unwrap();
    refused(
        &mut sweep(folder.path(), "0.4", "0-2"),
        "expected format kvw-sweep, schema_version 1, found format kvw-plan, schema_version 1",
    );
}

// ---- targets, probes, controls ---------------------------------------------------------------------

#[test]
fn a_target_is_met_by_the_written_model_or_nothing_is_written() {
    let folder = TempDir::new().unwrap();
    let unlearn = |target: &str, more: &[&str]| {
        let mut command = kvw(folder.path());
        command.args(["unlearn", &format!("{DEMO}/model"), "-o", "out"]);
        command.args(["--forget", &format!("{DEMO}/data/forget_heldout.jsonl")]);
        command.args(["--retain", &format!("{DEMO}/data/retain_heldout.jsonl")]);
        command.args(["--eval-limit", "6", "--layers", "0-2"]);
        command.args(["--target-forget", target, "--min-retain", "0.5"]);
        command.args(more);
        command
    };
    // γ 0.01 in six steps changes no answer.
    let output = unlearn("0.2", &["--gamma", "0.01"]).output().unwrap();
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(
        told.contains("no setting does what was asked for"),
        "{told}"
    );
    assert!(
        told.contains("the nearest is gamma 0.01, layers 0-2"),
        "{told}"
    );
    let left: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["out.sweep.json"], "only the points are kept");

    // The same points, and a stronger one: the sweep's file goes on, the model is written.
    done(&mut unlearn(
        "0.5",
        &["--gamma", "1.5", "--control", "permuted=1"],
    ));
    let sweep = read_json(&folder.path().join("out.sweep.json"));
    assert_eq!(sweep["points"].as_array().unwrap().len(), 2);
    assert_eq!(sweep["pick"]["point"], 1);
    let receipt = read_json(&folder.path().join("out/kvw.json"));
    assert_eq!(receipt["plan"]["parameters"]["gamma"], 1.5);
    let evidence = read_json(&folder.path().join("out.evaluation.json"));
    let after = &evidence["sets"][0]["models"]["after"]["summary"]["name_accuracy"]["value"];
    assert!(after.as_f64().unwrap() <= 0.5, "{after}");
    assert_eq!(evidence["controls"][0]["control"], "permuted");
    assert_eq!(evidence["controls"][0]["draws"], 1);

    // A sweep of other data has nothing to say here.
    let output = unlearn(
        "0.5",
        &["--sweep", "out.sweep.json", "--epochs", "2", "--force"],
    )
    .output()
    .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("belong to another epochs"));
}

#[test]
fn probes_ask_in_other_ways_and_say_what_they_could_not() {
    let folder = TempDir::new().unwrap();
    let data = |name: &str| format!("{DEMO}/data/{name}.jsonl");
    done(kvw(folder.path()).args([
        "unlearn",
        &format!("{DEMO}/model"),
        "-o",
        "out",
        "--plan",
        "p.plan",
        "--forget",
        &data("forget_heldout"),
        "--retain",
        &data("retain_heldout"),
        "--gamma",
        "1.5",
        "--layers",
        "0-2",
        "--eval-limit",
        "0",
    ]));
    let told = done(kvw(folder.path()).args([
        "probe",
        &format!("{DEMO}/model"),
        "--plan",
        "p.plan",
        "--forget",
        &data("forget_probes"),
        "--eval",
        &data("shapes"),
        "--limit",
        "3",
        "--probe",
        "paraphrased_questions",
        "--probe",
        "multiple_choice",
        "--probe",
        "hint_facts",
        "--control",
        "permuted=2",
        "-o",
        "probe.json",
        "--format",
        "json",
    ]));
    let told: Value = serde_json::from_str(&told).unwrap();
    let sets: Vec<_> = told["sets"]
        .as_array()
        .unwrap()
        .iter()
        .map(|set| {
            (
                set["set"].as_str().unwrap(),
                set["samples"].as_u64().unwrap(),
            )
        })
        .collect();
    assert_eq!(
        sets,
        [
            ("forget_probes", 3),
            ("forget_probes/paraphrased_questions", 3),
            ("forget_probes/hint_facts", 1),
            ("forget_probes/multiple_choice", 3),
            ("shapes", 3),
        ]
    );
    let skipped: Vec<_> = told["not_asked"]
        .as_array()
        .unwrap()
        .iter()
        .map(|skipped| format!("{} {}", skipped["set"], skipped["probe"]))
        .collect();
    assert_eq!(skipped.len(), 3, "{skipped:?}");
    let choice = &told["sets"][3]["models"];
    assert_eq!(choice["before"]["summary"]["ranked_first"]["value"], 1.0);
    assert!(
        choice["before"]["answers"].is_null(),
        "answers are in the file only"
    );
    let spread = &told["controls"][0]["sets"]["forget"]["name_accuracy"]["values"];
    assert_eq!(spread.as_array().unwrap().len(), 2);
    let file = read_json(&folder.path().join("probe.json"));
    let asked = file["sets"][2]["models"]["after"]["answers"][0]["question"].as_str();
    assert!(
        asked.unwrap().starts_with("The person's job is "),
        "{asked:?}"
    );

    let shapes = data("shapes");
    let retain = data("retain_heldout");
    for (sets, complaint) in [
        (
            &["--forget", &shapes, "--retain", &retain][..],
            "expected names in the forget set",
        ),
        (
            &["--forget", &retain],
            "expected a retain set to draw other people from",
        ),
    ] {
        // Before ONNX Runtime is asked for anything.
        let refused = kvw(folder.path())
            .args(["probe", &format!("{DEMO}/model"), "--plan", "p.plan"])
            .args(sets)
            .args(["--control", "other-people", "--ort-lib", "no-such-library"])
            .output()
            .unwrap();
        assert_eq!(refused.status.code(), Some(2));
        let told = text(&refused.stderr);
        assert!(told.contains(complaint), "{told}");
    }
}

#[test]
fn an_answer_is_as_long_as_the_model_says_unless_the_user_does() {
    let desk = Desk::new();
    let model = desk.inputs.join("model");
    for (path, bytes) in tree(&MODEL) {
        let to = model.join(path);
        match bytes {
            Some(bytes) => {
                fs::create_dir_all(to.parent().unwrap()).unwrap();
                fs::write(to, bytes).unwrap();
            }
            None => fs::create_dir_all(to).unwrap(),
        }
    }
    let config = model.join("generation_config.json");
    let original: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    let eval = |key: &str, value: usize, arguments: &[&str]| {
        let mut changed = original.clone();
        changed[key] = value.into();
        fs::write(&config, changed.to_string()).unwrap();
        let mut command = desk.kvw();
        command.args(["--format", "json", "eval"]).arg(&model);
        command.arg("--data").arg(&desk.forget);
        command.args(["--limit", "1", "--answers"]).args(arguments);
        command
    };
    let found = |key: &str, value: usize, arguments: &[&str]| {
        let said = done(&mut eval(key, value, arguments));
        let said: Value = serde_json::from_str(&said).unwrap();
        let answer = &said["sets"][0]["models"]["model"]["answers"][0]["prediction"];
        (
            answer.as_str().unwrap().to_owned(),
            said["max_new_tokens"].as_u64().unwrap(),
            said["max_length"].as_u64(),
        )
    };
    let (whole, ..) = found("max_new_tokens", 50, &[]);
    let (short, limit, length) = found("max_new_tokens", 2, &[]);
    assert_eq!((limit, length), (2, None));
    assert!(whole.starts_with(&short) && short.len() < whole.len());
    // The user's own limit comes first.
    let given = &["--max-new-tokens", "50"];
    assert_eq!(found("max_new_tokens", 2, given).0, whole);
    assert_eq!(found("max_length", 3, given).0, whole);

    let refused = eval("max_length", 3, &[]).output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
    let said = text(&refused.stderr);
    assert!(
        said.contains("fewer than 3 tokens (max_length in generation_config.json or")
            && said.contains("--max-new-tokens"),
        "{said}"
    );
    let (_, prompt) = said.split_once("genai_config.json), found ").unwrap();
    let prompt: String = prompt.chars().take_while(char::is_ascii_digit).collect();
    let prompt: usize = prompt.parse().unwrap();
    let (answer, limit, length) = found("max_length", prompt + 2, &[]);
    assert_eq!(answer, short);
    let expected = u64::try_from(prompt).unwrap() + 2;
    assert_eq!((limit, length), (expected, Some(expected)));
}
