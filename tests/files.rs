//! Files are never half written, and nothing outside the model folder is ever opened.

// clippy.toml allows these in `#[test]` functions, which does not reach the helpers beside them.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;

use kvw::files::contain::{self, Root, open_beneath};
use kvw::files::{
    Error, Method, PatchTarget, RECEIPT, StagedFolder, available_bytes, copy_file, patch_file,
    write_atomic,
};

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

// ---------------------------------------------------------------- containment

#[test]
fn no_hostile_location_opens_anything() {
    let outer = tempfile::tempdir().unwrap();
    let model = outer.path().join("model");
    fs::create_dir_all(model.join("onnx/deep")).unwrap();
    fs::create_dir(outer.path().join("model-evil")).unwrap();
    for secret in ["secret", "model-evil/secret"] {
        fs::write(outer.path().join(secret), "secret").unwrap();
    }
    fs::write(model.join("weights"), "weights").unwrap();
    let secret = outer.path().join("secret");
    let link = |target: &Path, name: &str| symlink(target, model.join(name)).unwrap();
    link(Path::new("../secret"), "up");
    link(&secret, "absolute");
    link(Path::new(".."), "parent");
    link(outer.path(), "absolute-parent");
    link(Path::new("parent/secret"), "through");
    link(Path::new("up"), "chain");
    link(Path::new("nowhere"), "dangling");
    link(Path::new("../nowhere"), "dangling-outside");
    link(Path::new("loop"), "loop");
    link(Path::new("/dev/zero"), "device");
    link(Path::new("/proc/self/exe"), "magic");
    link(Path::new("/proc/self/root"), "magic-root");
    link(Path::new("../../secret"), "onnx/up");
    link(Path::new("../model-evil"), "sibling");
    link(Path::new("/"), "root");
    let fifo = Command::new("mkfifo")
        .arg(model.join("pipe"))
        .status()
        .unwrap();
    assert!(fifo.success());
    let _socket = std::os::unix::net::UnixListener::bind(model.join("socket")).unwrap();
    let absolute = secret.to_str().unwrap();
    let long = "a/".repeat(3000) + "a";
    let long_name = "a".repeat(300);

    let hostile = [
        // Text that is refused whatever lies on the disk.
        "",
        ".",
        "..",
        "/",
        "./",
        "onnx/",
        "onnx/.",
        "onnx/..",
        "/etc/passwd",
        "//etc/passwd",
        absolute,
        "../secret",
        "./../secret",
        "../model-evil/secret",
        "onnx/../../secret",
        "onnx/deep/../../../secret",
        "onnx/..//../secret",
        "missing/../../secret",
        "....//secret",
        "../model/weights",
        "..\\secret",
        "onnx\\..\\..\\secret",
        "\\\\server\\share",
        "C:\\secret",
        "C:secret",
        "c:/secret",
        "file:///etc/passwd",
        "http://example.org/weights",
        "weights\0",
        "\0",
        "weights\n",
        "\u{1b}[2Jweights",
        "*/_ORT_MEM_ADDR_/*",
        "x/_ORT_MEM_ADDR_/y",
        "*",
        "~/secret",
        "weights/",
        "weights/.",
        "weights/x",
        &long,
        &long_name,
        // Links that leave, loop, or lead to what is no file.
        "up",
        "absolute",
        "parent/secret",
        "parent/model/../secret",
        "absolute-parent/secret",
        "through",
        "chain",
        "dangling",
        "dangling-outside",
        "loop",
        "device",
        "magic",
        "magic-root/etc/passwd",
        "onnx/up",
        "sibling/secret",
        "root/etc/passwd",
        // Things inside that are no regular files.
        "onnx",
        "onnx/deep",
        "pipe",
        "socket",
    ];
    assert!(hostile.len() >= 40);
    for location in hostile {
        match open_beneath(&model, location) {
            Ok(opened) => panic!("{location:?} opened {}", opened.path.display()),
            Err(e) => {
                let text = e.to_string();
                assert!(
                    text.len() < 10_000 && !text.contains('\0'),
                    "{location:?}: {text}"
                );
                assert!(!text.contains('\u{1b}'), "{location:?}: {text}");
            }
        }
    }
    assert!(matches!(
        open_beneath(&model, "up"),
        Err(contain::Error::Escapes { .. })
    ));
    assert!(matches!(
        open_beneath(&model, "pipe"),
        Err(contain::Error::NotRegular { .. })
    ));
    assert!(matches!(
        open_beneath(&model, "dangling"),
        Err(contain::Error::Missing { .. })
    ));
    assert!(matches!(
        open_beneath(&model, "../x"),
        Err(contain::Error::Text { .. })
    ));
}

#[test]
fn harmless_locations_open_and_hard_links_are_flagged() {
    let outer = tempfile::tempdir().unwrap();
    let model = outer.path().join("model");
    fs::create_dir_all(model.join("onnx")).unwrap();
    fs::write(model.join("weights"), "weights").unwrap();
    fs::write(model.join("onnx/é model.onnx_data"), "data").unwrap();
    symlink("weights", model.join("inside")).unwrap();
    symlink(model.join("weights"), model.join("absolute-inside")).unwrap();
    symlink("onnx", model.join("folder")).unwrap();
    symlink(&model, outer.path().join("linked-model")).unwrap();
    fs::write(outer.path().join("outside"), "outside").unwrap();
    fs::hard_link(outer.path().join("outside"), model.join("hard")).unwrap();

    for (location, content) in [
        ("weights", "weights"),
        ("./weights", "weights"),
        ("onnx/../weights", "weights"),
        ("inside", "weights"),
        ("absolute-inside", "weights"),
        ("onnx/é model.onnx_data", "data"),
        ("folder/é model.onnx_data", "data"),
    ] {
        for root in [model.clone(), outer.path().join("linked-model")] {
            let mut opened = open_beneath(&root, location).unwrap();
            let mut text = String::new();
            opened.file.read_to_string(&mut text).unwrap();
            assert_eq!((text.as_str(), opened.links), (content, 1), "{location}");
            assert_eq!(opened.len, u64::try_from(content.len()).unwrap());
            assert!(opened.path.starts_with(model.canonicalize().unwrap()));
        }
    }
    let hard = open_beneath(&model, "hard").unwrap();
    assert_eq!(hard.links, 2);
    assert!(matches!(
        PatchTarget::open(&hard.path),
        Err(Error::HardLinked { links: 2, .. })
    ));

    // A model file in a subfolder may climb to the model folder, and no further.
    let root = Root::of(&model).unwrap();
    assert!(root.open_from("onnx", "../weights").is_ok());
    assert!(root.open_from("onnx", "../../outside").is_err());
    assert!(Root::of(&model.join("weights")).is_err());
}

#[test]
fn a_hugging_face_cache_is_one_root_and_its_neighbours_are_not() {
    let hub = tempfile::tempdir().unwrap();
    let entry = hub.path().join("models--org--name");
    let snapshot = entry.join("snapshots/0123abc");
    fs::create_dir_all(snapshot.join("onnx")).unwrap();
    fs::create_dir(entry.join("blobs")).unwrap();
    fs::write(entry.join("blobs/d1"), "blob").unwrap();
    symlink("../../../blobs/d1", snapshot.join("onnx/model.onnx_data")).unwrap();
    let other = hub.path().join("models--org--other/blobs");
    fs::create_dir_all(&other).unwrap();
    fs::write(other.join("d2"), "other").unwrap();
    symlink(
        "../../../models--org--other/blobs/d2",
        snapshot.join("neighbour"),
    )
    .unwrap();
    fs::write(hub.path().join("token"), "secret").unwrap();
    symlink("../../../token", snapshot.join("token")).unwrap();

    assert!(open_beneath(&snapshot, "onnx/model.onnx_data").is_ok());
    assert!(open_beneath(&snapshot.join("onnx"), "model.onnx_data").is_ok());
    // Links may lead to the blobs; the model's own text may not climb there.
    assert!(open_beneath(&snapshot, "../../blobs/d1").is_err());
    for name in ["neighbour", "token"] {
        let refused = open_beneath(&snapshot, name).unwrap_err();
        assert!(
            matches!(refused, contain::Error::Escapes { .. }),
            "{refused:?}"
        );
        assert!(refused.hint().unwrap().contains("cp -rL"));
    }
    // The name alone makes no cache: without `snapshots`, links into a neighbour stay refused.
    let plain = hub.path().join("models--plain");
    fs::create_dir_all(plain.join("onnx")).unwrap();
    fs::write(plain.join("weights"), "w").unwrap();
    symlink("../weights", plain.join("onnx/weights")).unwrap();
    assert!(open_beneath(&plain.join("onnx"), "weights").is_err());
}

// ---------------------------------------------------------------- new folders

#[test]
fn a_folder_appears_whole_with_ordinary_modes_and_nothing_else_remains() {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("out");
    let mut staged = StagedFolder::create(&dest, false).unwrap();
    staged.write("onnx/model.onnx", b"model").unwrap();
    staged.seal("onnx/model.onnx").unwrap();
    staged
        .create_file(RECEIPT)
        .unwrap()
        .write_all(b"{}")
        .unwrap();
    assert!(!dest.exists());
    staged.commit().unwrap();
    assert_eq!(names(dir.path()), ["out"]);
    assert_eq!(names(&dest), [RECEIPT, "onnx"]);
    assert_eq!(fs::read(dest.join("onnx/model.onnx")).unwrap(), b"model");
    let plain = dir.path().join("plain");
    fs::create_dir(&plain).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(
        mode(&dest),
        mode(&plain),
        "the umask decides, as for any folder"
    );
}

#[test]
fn a_folder_given_up_leaves_nothing_and_bad_names_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let staged = StagedFolder::create(&dir.path().join("out"), false).unwrap();
    staged.write("a", b"a").unwrap();
    for name in ["", "/etc/x", "../x", "a/../../x", "a/", ".", "x\0"] {
        let refused = staged.write(name, b"x");
        assert!(
            matches!(refused, Err(Error::BadName { .. })),
            "{name:?}: {refused:?}"
        );
    }
    assert!(matches!(
        staged.write("a", b"again"),
        Err(Error::Exists { .. })
    ));
    drop(staged);
    assert_eq!(names(dir.path()), Vec::<String>::new());

    let staged = StagedFolder::create(&dir.path().join("out"), false).unwrap();
    symlink("/etc/passwd", staged.path().join("link")).unwrap();
    assert!(matches!(staged.commit(), Err(Error::NotRegular { .. })));
    assert_eq!(names(dir.path()), Vec::<String>::new());
}

#[test]
fn what_exists_is_replaced_only_with_force_and_only_if_it_is_ours() {
    let dir = tempfile::tempdir().unwrap();
    let make = |name: &str, force| {
        let staged = StagedFolder::create(&dir.path().join(name), force)?;
        staged.write(RECEIPT, b"new")?;
        staged.commit()
    };
    let folder = |name: &str, file: &str| {
        let path = dir.path().join(name);
        fs::create_dir(&path).unwrap();
        if !file.is_empty() {
            fs::write(path.join(file), "old").unwrap();
        }
    };
    folder("ours", RECEIPT);
    folder("empty", "");
    folder("foreign", "thesis.txt");
    fs::write(dir.path().join("file"), "old").unwrap();
    symlink("ours", dir.path().join("link")).unwrap();
    symlink("nowhere", dir.path().join("dangling")).unwrap();
    for name in ["ours", "empty", "foreign", "file", "link", "dangling"] {
        let refused = make(name, false).unwrap_err();
        assert!(
            matches!(refused, Error::Exists { .. }),
            "{name}: {refused:?}"
        );
        assert!(refused.hint().unwrap().contains("--force"));
    }
    for name in ["foreign", "file", "link", "dangling"] {
        let refused = make(name, true).unwrap_err();
        assert!(
            matches!(refused, Error::Foreign { .. }),
            "{name}: {refused:?}"
        );
    }
    assert_eq!(
        fs::read(dir.path().join("ours").join(RECEIPT)).unwrap(),
        b"old"
    );
    for name in ["ours", "empty", "fresh"] {
        make(name, true).unwrap();
        assert_eq!(
            fs::read(dir.path().join(name).join(RECEIPT)).unwrap(),
            b"new"
        );
    }
    assert_eq!(
        names(dir.path()),
        [
            "dangling", "empty", "file", "foreign", "fresh", "link", "ours"
        ]
    );

    // Something that came into being meanwhile is not overwritten either.
    let staged = StagedFolder::create(&dir.path().join("race"), false).unwrap();
    folder("race", "");
    assert!(matches!(staged.commit(), Err(Error::Exists { .. })));
    for (dest, expected) in [
        ("no/such/out", "NoParent"),
        ("..", "NoName"),
        ("/", "NoName"),
    ] {
        let refused = StagedFolder::create(&dir.path().join(dest), false).unwrap_err();
        assert!(format!("{refused:?}").starts_with(expected), "{refused:?}");
    }
}

#[test]
#[ignore = "run by the test below, which kills it"]
fn child_that_dies_while_writing() {
    let Some(dir) = std::env::var_os("KVW_TEST_FOLDER") else {
        return;
    };
    let staged = StagedFolder::create(&Path::new(&dir).join("out"), false).unwrap();
    staged.write("half", b"half").unwrap();
    write_atomic(&Path::new(&dir).join("plan"), false, |file| {
        file.write_all(b"half")?;
        file.flush()?;
        std::process::abort()
    })
    .unwrap();
}

#[test]
fn what_a_dead_process_left_is_removed_by_the_next_run_and_a_live_one_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "child_that_dies_while_writing",
            "--include-ignored",
        ])
        .env("KVW_TEST_FOLDER", dir.path())
        .output()
        .unwrap();
    assert!(!child.status.success());
    let left = names(dir.path());
    assert_eq!(left.len(), 2, "{left:?}");
    assert!(
        left.iter().all(|name| name.contains(".kvw-partial-")),
        "{left:?}"
    );
    // A stranger's file with almost that name, and another destination's leftovers.
    fs::write(dir.path().join(".out.kvw-partial-notes"), "mine").unwrap();
    fs::create_dir(dir.path().join(".out2.kvw-partial-1-abcdef")).unwrap();

    let alive = StagedFolder::create(&dir.path().join("out"), false).unwrap();
    let second = StagedFolder::create(&dir.path().join("out"), false).unwrap();
    assert!(alive.path().exists() && second.path().exists());
    second.write("whole", b"whole").unwrap();
    second.commit().unwrap();
    assert!(matches!(alive.commit(), Err(Error::Exists { .. })));
    write_atomic(&dir.path().join("plan"), false, |file| {
        file.write_all(b"whole")
    })
    .unwrap();
    assert_eq!(
        names(dir.path()),
        [
            ".out.kvw-partial-notes",
            ".out2.kvw-partial-1-abcdef",
            "out",
            "plan"
        ]
    );
}

#[test]
#[ignore = "run by the test below, which interrupts it"]
fn child_that_is_interrupted_while_writing() {
    let Some(dir) = std::env::var_os("KVW_TEST_FOLDER") else {
        return;
    };
    kvw::files::interrupt::listen(|by| std::process::exit(128 + by.signal)).unwrap();
    let staged = StagedFolder::create(&Path::new(&dir).join("out"), false).unwrap();
    staged.write("half", b"half").unwrap();
    write_atomic(&Path::new(&dir).join("done"), false, |file| {
        file.write_all(b"whole")
    })
    .unwrap();
    write_atomic(&Path::new(&dir).join("plan"), false, |file| {
        file.write_all(b"half")?;
        fs::write(Path::new(&dir).join("ready"), "")?;
        std::thread::sleep(std::time::Duration::from_secs(60));
        Ok(())
    })
    .unwrap();
}

/// Runs the test above under a shell that does `first`, until it writes, and sends it `signals`. Returns its exit code.
fn interrupted(dir: &Path, first: &str, signals: &[&str]) -> Option<i32> {
    let mut child = Command::new("sh")
        .args(["-c", &format!("{first} exec \"$0\" \"$@\"")])
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "child_that_is_interrupted_while_writing",
            "--include-ignored",
        ])
        .env("KVW_TEST_FOLDER", dir)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    while !dir.join("ready").exists() {
        assert!(child.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    for signal in signals {
        let kill = Command::new("kill")
            .args(["-s", signal, &child.id().to_string()])
            .status();
        assert!(kill.unwrap().success());
    }
    child.wait().unwrap().code()
}

#[test]
fn an_interrupted_process_takes_its_temporaries_away_and_says_by_its_code_which_signal_it_was() {
    // Whoever runs the tests may have them ignore signals: `nohup` SIGHUP, a shell's background job SIGINT. A child
    // inherits that.
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    let hears = |signal: u32| ignored.is_none_or(|mask| mask & (1 << (signal - 1)) == 0);
    for (first, signals, code) in [
        ("", &["INT"][..], 130),
        ("", &["TERM"], 143),
        ("", &["HUP"], 129),
        // As `nohup` has it: the first one is not heard.
        ("trap '' HUP;", &["HUP", "TERM"], 143),
    ] {
        if !hears(code - 128) {
            continue;
        }
        let dir = tempfile::tempdir().unwrap();
        let found = interrupted(dir.path(), first, signals);
        assert_eq!(
            found.and_then(|found| u32::try_from(found).ok()),
            Some(code)
        );
        assert_eq!(names(dir.path()), ["done", "ready"]);
    }
}

// ---------------------------------------------------------------- single files

#[test]
fn a_file_is_written_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let plan = dir.path().join("plan");
    let put = |path: &Path, force, text: &'static [u8]| {
        write_atomic(path, force, |file| file.write_all(text))
    };
    put(&plan, false, b"one").unwrap();
    assert!(matches!(
        put(&plan, false, b"two"),
        Err(Error::Exists { .. })
    ));
    put(&plan, true, b"three").unwrap();
    assert_eq!(fs::read(&plan).unwrap(), b"three");
    let failed = write_atomic(&plan, true, |file| {
        file.write_all(b"half")?;
        Err(io::ErrorKind::StorageFull.into())
    });
    assert!(matches!(failed, Err(Error::DiskFull { .. })), "{failed:?}");
    assert_eq!(fs::read(&plan).unwrap(), b"three");
    assert!(matches!(
        put(dir.path(), true, b"x"),
        Err(Error::NotRegular { .. })
    ));

    // A link is replaced, and what it pointed to stays.
    let link = dir.path().join("link");
    symlink("plan", &link).unwrap();
    put(&link, true, b"four").unwrap();
    assert!(link.symlink_metadata().unwrap().is_file());
    assert_eq!(fs::read(&plan).unwrap(), b"three");
    assert_eq!(names(dir.path()), ["link", "plan"]);
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
    fs::write(dir.path().join("plain"), "").unwrap();
    assert_eq!(mode(&plan), mode(&dir.path().join("plain")));
}

#[test]
fn a_copy_follows_links_keeps_the_mode_and_never_overwrites() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let bytes: Vec<u8> = (0..2_500_000u32).map(|i| i.to_be_bytes()[3]).collect();
    fs::write(at("blob"), &bytes).unwrap();
    fs::set_permissions(at("blob"), fs::Permissions::from_mode(0o440)).unwrap();
    symlink("blob", at("link")).unwrap();

    let copied = copy_file(&at("link"), &at("copy")).unwrap();
    assert_eq!(copied.bytes, 2_500_000);
    assert!(matches!(copied.method, Method::Copied | Method::Reflink));
    assert!(at("copy").symlink_metadata().unwrap().is_file());
    assert_eq!(fs::metadata(at("copy")).unwrap().mode() & 0o777, 0o640);
    assert_eq!(fs::read(at("copy")).unwrap(), bytes);
    assert!(matches!(
        copy_file(&at("blob"), &at("copy")),
        Err(Error::Exists { .. })
    ));
    assert_eq!(fs::read(at("copy")).unwrap(), bytes);
    assert!(matches!(
        copy_file(dir.path(), &at("x")),
        Err(Error::NotRegular { .. })
    ));
    assert!(
        Command::new("mkfifo")
            .arg(at("pipe"))
            .status()
            .unwrap()
            .success()
    );
    assert!(matches!(
        copy_file(&at("pipe"), &at("x")),
        Err(Error::NotRegular { .. })
    ));
    assert!(!at("x").exists());
}

#[test]
fn a_patch_changes_its_ranges_and_nothing_else_and_never_grows_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, [7; 1000]).unwrap();
    let patches = [
        (0, vec![1, 2]),
        (500, vec![3; 10]),
        (998, vec![4, 5]),
        (1000, vec![]),
    ];
    assert_eq!(patch_file(&file, patches).unwrap(), 14);
    let mut expected = [7; 1000];
    expected[..2].copy_from_slice(&[1, 2]);
    expected[500..510].copy_from_slice(&[3; 10]);
    expected[998..].copy_from_slice(&[4, 5]);
    assert_eq!(fs::read(&file).unwrap(), expected);
    for (offset, count) in [(999, 2), (1001, 0), (u64::MAX, 1), (1000, 1)] {
        let refused = patch_file(&file, [(offset, vec![0; count])]).unwrap_err();
        assert!(
            matches!(refused, Error::PatchOutOfRange { len: 1000, .. }),
            "{refused:?}"
        );
    }
    assert_eq!(fs::read(&file).unwrap(), expected);

    let target = PatchTarget::open(&file).unwrap();
    std::thread::scope(|scope| {
        for i in 0..10u8 {
            let target = &target;
            scope.spawn(move || target.write_at(u64::from(i) * 100, &[i; 100]).unwrap());
        }
    });
    target.sync().unwrap();
    let mut tail = [0; 100];
    target.read_at(900, &mut tail).unwrap();
    assert_eq!(tail, [9; 100]);

    symlink("file", dir.path().join("link")).unwrap();
    let refused = PatchTarget::open(&dir.path().join("link"));
    assert!(matches!(refused, Err(Error::NotRegular { .. })));
    fs::hard_link(&file, dir.path().join("hard")).unwrap();
    assert!(matches!(
        PatchTarget::open(&file),
        Err(Error::HardLinked { links: 2, .. })
    ));
}

#[test]
fn room_is_asked_for_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let available = available_bytes(&dir.path().join("not/yet/there")).unwrap();
    assert!(available > 0);
    let staged = StagedFolder::create(&dir.path().join("out"), false).unwrap();
    staged.require_space(1).unwrap();
    let error = staged.require_space(u64::MAX).unwrap_err();
    assert!(matches!(
        error,
        Error::DiskFull {
            needed: Some(u64::MAX),
            ..
        }
    ));
    assert!(
        error
            .to_string()
            .contains("18446744073709551615 bytes needed"),
        "{error}"
    );
    assert!(error.hint().unwrap().contains("another disk"));
}
