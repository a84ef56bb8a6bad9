//! The release gate and the report, on the output of `kvw demo`: what passes, and that each thing that
//! must fail does, with its code.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::indexing_slicing
)]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use kvw::runtime::{Device, locate};
use serde_json::Value;
use tempfile::TempDir;

const DECODER: &str = "onnx/decoder_model_merged.onnx";

fn kvw(folder: &Path) -> Command {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    let library = LIBRARY.get_or_init(|| {
        let options = locate::Options::from_env(None, Device::Cpu, false).unwrap();
        let found = locate::locate(&options, &|line| eprintln!("{line}"));
        found.unwrap().path
    });
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvw"));
    command.current_dir(folder).env("ORT_DYLIB_PATH", library);
    command
}

/// A folder that holds `kvw-demo`, as `kvw demo` leaves it. Nothing changes it.
fn demo() -> &'static Path {
    static DEMO: OnceLock<PathBuf> = OnceLock::new();
    DEMO.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("check");
        fs::create_dir_all(&folder).unwrap();
        let output = kvw(&folder).arg("demo").output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}");
        folder
    })
}

/// A copy of the demo's output, to be damaged.
fn copy() -> TempDir {
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    copy_all(&demo().join("kvw-demo"), &folder.path().join("kvw-demo"));
    folder
}

fn copy_all(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy_all(&entry.path(), &to),
            false => drop(fs::copy(entry.path(), to).unwrap()),
        }
    }
}

/// Runs `kvw check` with everything given. Returns the exit code and the verdict.
fn check(folder: &Path, extra: &[&str]) -> (i32, Value) {
    let mut command = kvw(folder);
    command.args(["check", "kvw-demo/unlearned", "--format", "json"]);
    for (flag, value) in [
        ("--policy", "kvw-demo/policy.toml"),
        ("--evidence", "kvw-demo/unlearned.evaluation.json"),
        ("--original", "kvw-demo/model"),
    ] {
        match extra.iter().position(|given| *given == flag) {
            // A flag with an empty value is left out.
            Some(at) if extra[at + 1].is_empty() => {}
            Some(at) => drop(command.args([flag, extra[at + 1]])),
            None => drop(command.args([flag, value])),
        }
    }
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    let verdict =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {stderr}"));
    (output.status.code().unwrap(), verdict)
}

/// The codes of findings with this severity.
fn codes(verdict: &Value, severity: &str) -> BTreeSet<String> {
    let checks = verdict["checks"].as_array().unwrap();
    checks
        .iter()
        .flat_map(|check| check["findings"].as_array().unwrap())
        .filter(|finding| finding["severity"] == severity)
        .map(|finding| finding["code"].as_str().unwrap().to_owned())
        .collect()
}

#[track_caller]
fn fails_with(folder: &Path, extra: &[&str], expected: &[&str]) {
    let (code, verdict) = check(folder, extra);
    let expected: BTreeSet<String> = expected.iter().map(ToString::to_string).collect();
    assert_eq!(codes(&verdict, "error"), expected, "{verdict:#}");
    assert_eq!(code, 1);
}

fn flip(file: &Path, offset: u64) {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(file)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn the_demo_clears_its_policy_and_says_what_it_only_warns_of() {
    let (code, verdict) = check(demo(), &[]);
    assert_eq!(codes(&verdict, "error"), BTreeSet::new(), "{verdict:#}");
    assert_eq!((code, &verdict["passed"]), (0, &Value::Bool(true)));
    assert!(codes(&verdict, "warning").contains("above-maximum"));
}

#[test]
fn an_untouched_model_called_unlearned_fails() {
    let folder = copy();
    let demo = folder.path().join("kvw-demo");
    let receipt = fs::read(demo.join("unlearned/kvw.json")).unwrap();
    fs::remove_dir_all(demo.join("unlearned")).unwrap();
    copy_all(&demo.join("model"), &demo.join("unlearned"));
    fails_with(folder.path(), &[], &["receipt-missing", "evidence-unbound"]);
    fs::write(demo.join("unlearned/kvw.json"), receipt).unwrap();
    fails_with(folder.path(), &[], &["range-not-edited"]);
    fails_with(
        folder.path(),
        &["--original", ""],
        &["range-not-edited", "outside-unchecked"],
    );
}

#[test]
fn a_decoder_file_that_was_forgotten_fails() {
    let folder = copy();
    let demo = folder.path().join("kvw-demo");
    let other = demo.join("unlearned/onnx/decoder_model_merged_fp16.onnx");
    fs::copy(demo.join("model").join(DECODER), other).unwrap();
    fails_with(folder.path(), &[], &["decoder-not-edited", "file-added"]);
}

#[test]
fn a_byte_changed_outside_the_plan_fails() {
    // The second one lies in another weight.
    for (file, offset) in [("tokenizer.json", 100), (DECODER, 5_000_000)] {
        let folder = copy();
        flip(&folder.path().join("kvw-demo/unlearned").join(file), offset);
        fails_with(folder.path(), &[], &["outside-changed"]);
    }
}

#[test]
fn a_byte_changed_inside_a_planned_range_fails_without_the_original() {
    let folder = copy();
    let demo = folder.path().join("kvw-demo");
    let receipt = json(&demo.join("unlearned/kvw.json"));
    let offset = receipt["files"][0]["ranges"][0]["offset"].as_u64().unwrap();
    flip(&demo.join("unlearned").join(DECODER), offset + 5);
    fails_with(
        folder.path(),
        &["--original", ""],
        &["range-altered", "outside-unchecked"],
    );
}

#[test]
fn another_original_fails() {
    let folder = copy();
    let demo = folder.path().join("kvw-demo");
    copy_all(&demo.join("unlearned"), &demo.join("other"));
    fails_with(
        folder.path(),
        &["--original", "kvw-demo/other"],
        &["original-mismatch"],
    );
}

#[test]
fn an_evaluation_of_another_model_fails() {
    let folder = copy();
    let path = folder.path().join("kvw-demo/unlearned.evaluation.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replacen("Frostcroft", "Frostcraft", 1)).unwrap();
    fails_with(folder.path(), &[], &["evidence-mismatch"]);
}

#[test]
fn a_bar_that_is_missed_fails_with_the_line_that_set_it() {
    let folder = copy();
    let policy = "version = 1\n\n[[threshold]]\nkind = \"retain\"\nmetric = \"name_accuracy\"\nmin = 0.999\n\
                  \n[[threshold]]\nset = \"nobody\"\nmetric = \"loss\"\nmin = 0\n\
                  \n[[threshold]]\nset = \"forget\"\nmetric = \"loss\"\nmodel = \"model\"\nmin = 0\n\
                  \n[[threshold]]\nset = \"shapes\"\nmetric = \"name_accuracy\"\nmin = 0\n\
                  \n[sets.shapes]\nmin_samples = 61\nsha256 = \"0000000000000000000000000000000000000000000000000000000000000000\"\n\
                  \n[tool]\nmin_version = \"99.0.0\"\n\n[edits]\nvariants = [\"fp32\", \"q4\"]\n";
    fs::write(folder.path().join("strict.toml"), policy).unwrap();
    let extra = ["--policy", "strict.toml"];
    fails_with(
        folder.path(),
        &extra,
        &[
            "below-minimum",
            "metric-not-computed",
            "model-missing",
            "set-digest",
            "set-missing",
            "set-too-small",
            "tool-version",
            "variant-missing",
        ],
    );
    let (_, verdict) = check(folder.path(), &extra);
    let below = verdict["checks"]
        .as_array()
        .unwrap()
        .iter()
        .find_map(|check| {
            let findings = check["findings"].as_array().unwrap();
            findings
                .iter()
                .find(|finding| finding["code"] == "below-minimum")
        });
    assert_eq!(below.unwrap()["policy_line"], 5);
}

#[test]
fn a_machine_without_data_and_original_can_gate_where_the_policy_allows_it() {
    let folder = copy();
    let demo = folder.path().join("kvw-demo");
    let alone = ["--evidence", "", "--original", ""];
    fails_with(folder.path(), &alone, &["outside-unchecked"]);
    let policy = fs::read_to_string(demo.join("policy.toml")).unwrap();
    let allowing = policy + "\n[severity]\noutside-unchecked = \"note\"\n";
    fs::write(demo.join("policy.toml"), allowing).unwrap();
    for gone in ["data", "model"] {
        fs::remove_dir_all(demo.join(gone)).unwrap();
    }
    fs::remove_file(demo.join("unlearned.evaluation.json")).unwrap();
    let (code, verdict) = check(folder.path(), &alone);
    assert_eq!(code, 0, "{verdict:#}");
    let noted = codes(&verdict, "note");
    assert!(noted.contains("outside-unchecked") && noted.contains("evidence-not-read"));
}

#[test]
fn a_folder_without_an_evaluation_fails_but_for_a_policy_that_says_otherwise() {
    let folder = copy();
    let demo = folder.path().join("kvw-demo");
    let path = demo.join("unlearned/kvw.json");
    let mut receipt = json(&path);
    receipt.as_object_mut().unwrap().remove("evaluation");
    fs::write(&path, receipt.to_string()).unwrap();
    fails_with(folder.path(), &[], &["evidence-unbound"]);
    fails_with(folder.path(), &["--evidence", ""], &["evidence-missing"]);
}

#[test]
fn a_policy_that_cannot_be_read_is_exit_code_2_with_line_and_hint() {
    let folder = copy();
    fs::write(folder.path().join("p.toml"), "version = 1\n[[treshold]]\n").unwrap();
    let output = kvw(folder.path())
        .args(["check", "kvw-demo/unlearned", "--policy", "p.toml"])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("p.toml:2:"), "{stderr}");
    assert!(stderr.contains("did you mean `threshold`?"), "{stderr}");
    assert!(output.stdout.is_empty());
}

#[test]
fn every_form_tells_the_same_verdict() {
    let folder = copy();
    flip(
        &folder.path().join("kvw-demo/unlearned/tokenizer.json"),
        100,
    );
    for (form, expected) in [
        ("human", "outside-changed: tokenizer.json: 1 changed byte"),
        ("json", "\"code\": \"outside-changed\""),
        ("markdown", "`outside-changed`: tokenizer.json"),
        ("junit", "type=\"outside-changed\""),
        (
            "github",
            "::error title=kvw outside-changed::tokenizer.json",
        ),
    ] {
        let output = kvw(folder.path())
            .args(["check", "kvw-demo/unlearned", "--policy"])
            .args(["kvw-demo/policy.toml", "--original", "kvw-demo/model"])
            .args(["--format", form])
            .output()
            .unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{form}\n{stdout}");
        assert!(stdout.contains(expected), "{form}\n{stdout}");
    }
}

/// Runs `kvw report` on `folder`. Returns what it wrote.
fn report(folder: &Path, extra: &[&str]) -> String {
    let Output { status, stderr, .. } = kvw(folder)
        .args(["report", "kvw-demo/unlearned", "-o", "made", "--force"])
        .args(["--evidence", "kvw-demo/unlearned.evaluation.json"])
        .args(extra)
        .output()
        .unwrap();
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    fs::read_to_string(folder.join("made")).unwrap()
}

#[test]
fn the_demos_report_has_everything_in_it_and_loads_nothing() {
    let page = fs::read_to_string(demo().join("kvw-demo/report.html")).unwrap();
    for part in [
        "Passed",
        "Pimgol Frostcroft is a juggler from Silaville",
        "data:image/jpeg;base64,",
        "<h2 id=\"gates\">",
        "sha256",
        "Weakening is not proof of erasure",
    ] {
        assert!(page.contains(part), "{part}");
    }
    assert!(page.matches("<svg").count() >= 6);
    // Namespaces are names: nothing is fetched from them.
    let page = page.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
    for forbidden in ["http://", "https://", "src=\"/", "@import", "url("] {
        assert!(!page.contains(forbidden), "{forbidden}");
    }
}

#[test]
fn an_answer_cannot_become_markup() {
    let folder = copy();
    let path = folder.path().join("kvw-demo/unlearned.evaluation.json");
    let hostile =
        "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`|&lt;\u{1b}[2J";
    let mut evidence = json(&path);
    let set = &mut evidence["sets"][0];
    set["set"] = hostile.into();
    let answer = &mut set["models"]["after"]["answers"][0];
    for key in ["prediction", "question", "reference", "id"] {
        answer[key] = hostile.into();
    }
    fs::write(&path, evidence.to_string()).unwrap();
    let page = report(folder.path(), &[]);
    assert_eq!(page.matches("<script").count(), 1);
    assert!(!page.contains("<img src=x"));
    assert!(page.matches("&lt;script&gt;alert(1)").count() >= 5);
    let card = report(folder.path(), &["--format", "markdown"]);
    assert!(!card.contains("<script") && !card.contains("<img"));
}

#[test]
fn a_report_without_samples_and_a_model_card_name_nobody() {
    let folder = copy();
    let names: BTreeSet<String> =
        fs::read_to_string(folder.path().join("kvw-demo/data/forget.jsonl"))
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["name"].clone())
            .flat_map(|name| {
                let name = name.as_str().unwrap().to_owned();
                name.split(' ').map(str::to_owned).collect::<Vec<_>>()
            })
            .collect();
    assert_eq!(names.len(), 6);
    let page = report(folder.path(), &["--samples", "0"]);
    let card = report(folder.path(), &["--format", "markdown"]);
    for name in names {
        assert!(!page.contains(&name) && !card.contains(&name), "{name}");
    }
    assert!(card.contains("| full name | 100"), "{card}");
}

/// What `kvw probe` and `kvw sweep` say of the demo's model, few samples each.
fn probed_and_swept() -> &'static Path {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = copy();
        let run = |arguments: &[&str]| {
            let output = kvw(folder.path()).args(arguments).output().unwrap();
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{stderr}");
        };
        let (forget, retain) = ("kvw-demo/data/forget.jsonl", "kvw-demo/data/retain.jsonl");
        run(&[
            "probe",
            "kvw-demo/model",
            "--plan",
            "kvw-demo/forget.plan",
            "--forget",
            forget,
            "--retain",
            retain,
            "--eval",
            "forget=kvw-demo/data/forget_probes.jsonl",
            "--limit",
            "3",
            "--control",
            "permuted=2",
            "--min-k",
            "0.1",
            "-o",
            "probe.json",
        ]);
        run(&[
            "sweep",
            "kvw-demo/model",
            "--forget",
            forget,
            "--retain",
            retain,
            "--gamma",
            "0.2,0.4",
            "--layers",
            "0-2",
            "--eval-limit",
            "4",
            "-o",
            "sweep.json",
        ]);
        folder
    });
    folder.path()
}

/// The part of the page under the heading of this id.
fn section<'p>(page: &'p str, id: &str) -> &'p str {
    let (_, rest) = page.split_once(&format!("<h2 id=\"{id}\">")).unwrap();
    rest.split_once("</section>").unwrap().0
}

#[test]
fn a_report_shows_probes_controls_and_the_trade_off() {
    let folder = probed_and_swept();
    let all = [
        "--probe",
        "probe.json",
        "--sweep",
        "sweep.json",
        "--samples",
        "0",
    ];
    let page = report(folder, &all);
    // The template engine escapes slashes too.
    let page = page.replace("&#x2f;", "/");
    let holds = section(&page, "robustness");
    assert_eq!(
        holds.matches("<svg").count(),
        2,
        "one for each set to be forgotten"
    );
    for part in [
        ">forget_probes <span",
        "<th scope=\"row\">as it is</th>",
        "<th scope=\"row\">paraphrased_questions</th>",
        "<th scope=\"row\">facts_by_image</th>",
        "<td>3</td>",
        "ranked first",
        "the same gates on other neurons, 2 draws",
        "from the column <code>paraphrased_questions</code>",
    ] {
        assert!(holds.contains(part), "{part}: {holds}");
    }
    let settings = section(&page, "tradeoff");
    assert_eq!(settings.matches("<svg").count(), 1);
    let sweep = json(&folder.join("sweep.json"));
    for point in sweep["points"].as_array().unwrap() {
        let forget = 100.0 * point["tradeoff"]["forget"].as_f64().unwrap();
        let row = format!(
            "gamma {}, layers 0-2</th><td>{forget:.0}\u{a0}%</td>",
            point["parameters"]["gamma"]
        );
        assert!(settings.contains(&row), "{row}: {settings}");
    }
    assert!(
        settings.contains(
            sweep["pick"]["rule"]
                .as_str()
                .unwrap()
                .split('≥')
                .next()
                .unwrap()
        )
    );
    // Without them neither section is there, and the page says that nobody probed.
    let without = report(folder, &["--samples", "0"]);
    for id in ["robustness", "tradeoff"] {
        assert!(!without.contains(&format!("id=\"{id}\"")), "{id}");
    }
    assert!(without.contains("No probes were given"));
    assert!(!page.contains("No probes were given"));

    let card = report(folder, &[&all[..4], &["--format", "markdown"]].concat());
    for part in [
        "Asked in other ways, before → after:",
        "| forget/facts\\_by\\_name (forget) | 3 |",
        "| the same gates on other neurons, 2 draws | forget | full name |",
        "2 settings were tried",
    ] {
        assert!(card.contains(part), "{part}: {card}");
    }
}

#[test]
fn what_stands_between_backticks_is_code_on_the_page() {
    let page = fs::read_to_string(demo().join("kvw-demo/report.html")).unwrap();
    assert!(page.contains("(rule at <code>eval::text::is_degenerate</code>)"));
    let (_, body) = page.split_once("<body>").unwrap();
    let (body, _) = body.split_once("<script>").unwrap();
    assert!(!body.contains('`'));
}

#[test]
fn probes_of_another_plan_are_refused() {
    let folder = probed_and_swept();
    let mut probes = json(&folder.join("probe.json"));
    for other in [Value::from("00".repeat(32)), Value::Null] {
        probes["plan_digest"] = other;
        let file = TempDir::new().unwrap();
        let path = file.path().join("other.json");
        fs::write(&path, probes.to_string()).unwrap();
        let output = kvw(folder)
            .args(["report", "kvw-demo/unlearned", "-o", "refused", "--probe"])
            .arg(&path)
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(
            stderr.contains("expected probes of the plan of kvw-demo/unlearned"),
            "{stderr}"
        );
        assert!(!folder.join("refused").exists());
    }
}

#[test]
fn another_plan_than_the_folders_is_refused() {
    let folder = copy();
    let path = folder.path().join("kvw-demo/forget.plan");
    let bytes = fs::read(&path).unwrap();
    // The last gate's lowest bit.
    flip(&path, bytes.len() as u64 - 4);
    let output = kvw(folder.path())
        .args(["report", "kvw-demo/unlearned", "-o", "made", "--plan"])
        .arg("kvw-demo/forget.plan")
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(
        stderr.contains("expected the plan of kvw-demo/unlearned"),
        "{stderr}"
    );
    assert!(!folder.path().join("made").exists());
}

/// The commands of a guide: the lines of its `sh` blocks, continued lines joined.
fn commands(guide: &str) -> Vec<Vec<String>> {
    let mut commands = Vec::new();
    for block in guide.split("```sh\n").skip(1) {
        let block = block.split("```").next().unwrap().replace("\\\n", " ");
        for line in block.lines().filter(|line| line.starts_with("kvw ")) {
            let words = line.split(" > ").next().unwrap().split_whitespace();
            commands.push(words.skip(1).map(str::to_owned).collect());
        }
    }
    commands
}

#[test]
fn the_guides_commands_work_as_they_stand() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut count = 0;
    let folder = copy();
    for guide in ["docs/ci.md", "docs/report.md"] {
        let text = fs::read_to_string(root.join(guide)).unwrap();
        for command in commands(&text) {
            if command[0] == "demo" {
                continue;
            }
            let output = kvw(folder.path()).args(&command).output().unwrap();
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{guide}: {command:?}\n{stderr}");
            count += 1;
        }
    }
    assert!(count >= 6, "{count}");
}

/// What a workflow runs: `tools/action/action.yml` puts its inputs into the environment of this script.
#[test]
fn the_actions_steps_annotate_summarize_and_fail_as_the_check_does() {
    let folder = copy();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/action/check.sh");
    let beside = Path::new(env!("CARGO_BIN_EXE_kvw")).parent().unwrap();
    let path = format!("{}:{}", beside.display(), std::env::var("PATH").unwrap());
    let act = |policy: &str| {
        let mut command = Command::new("bash");
        command.current_dir(folder.path()).arg(&script);
        for (name, value) in [
            ("PATH", path.as_str()),
            ("FOLDER", "kvw-demo/unlearned"),
            ("POLICY", policy),
            ("EVIDENCE", "kvw-demo/unlearned.evaluation.json"),
            ("ORIGINAL", "kvw-demo/model"),
            ("JUNIT", "kvw-check.xml"),
            ("GITHUB_STEP_SUMMARY", "summary.md"),
        ] {
            command.env(name, value);
        }
        let output = command.output().unwrap();
        (
            output.status.code().unwrap(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
            fs::read_to_string(folder.path().join("kvw-check.xml")).unwrap(),
            fs::read_to_string(folder.path().join("summary.md")).unwrap(),
        )
    };
    let (code, annotations, junit, summary) = act("kvw-demo/policy.toml");
    assert_eq!(code, 0);
    assert!(
        annotations.contains("::warning file=kvw-demo/policy.toml"),
        "{annotations}"
    );
    assert!(
        junit.contains("<testsuites") && !junit.contains("<failure"),
        "{junit}"
    );
    assert!(summary.contains("kvw check: PASSED"), "{summary}");
    let strict = "version = 1\n[[threshold]]\nset = \"forget\"\nmetric = \"leak_any\"\nmax = 0.0\n";
    fs::write(folder.path().join("strict.toml"), strict).unwrap();
    let (code, annotations, junit, summary) = act("strict.toml");
    assert_eq!(code, 1);
    assert!(
        annotations.contains("::error file=strict.toml,line=4"),
        "{annotations}"
    );
    assert!(junit.contains("<failure"), "{junit}");
    assert!(summary.contains("kvw check: PASSED") && summary.contains("kvw check: FAILED"));
    // Every input of the action reaches the script.
    let action = fs::read_to_string(script.with_file_name("action.yml")).unwrap();
    for input in ["FOLDER", "POLICY", "EVIDENCE", "ORIGINAL", "JUNIT"] {
        let name = input.to_lowercase();
        assert!(
            action.contains(&format!("{input}: ${{{{ inputs.{name} }}}}")),
            "{input}"
        );
    }
}

#[test]
fn the_guide_lists_every_code_with_its_severity_and_meaning() {
    let guide = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/ci.md");
    let guide = fs::read_to_string(guide).unwrap();
    for code in kvw::check::Code::ALL {
        let line = format!(
            "| `{code}` | {} | {} |",
            code.default_severity(),
            code.description()
        );
        assert!(guide.contains(&line), "docs/ci.md lacks the line\n{line}");
    }
}

#[test]
fn what_vouches_for_a_folder_is_no_change_of_its_model() {
    let folder = copy();
    let mut sign = kvw(folder.path());
    sign.args(["sign", "kvw-demo/unlearned", "--original", "kvw-demo/model"]);
    let output = sign.arg("--bill").output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let (code, verdict) = check(folder.path(), &[]);
    assert_eq!(codes(&verdict, "error"), BTreeSet::new(), "{verdict:#}");
    assert_eq!(code, 0);
    fs::write(folder.path().join("kvw-demo/unlearned/extra.json"), "{}").unwrap();
    fails_with(folder.path(), &[], &["file-added"]);
}
