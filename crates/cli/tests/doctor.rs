//! `farcall doctor`: what it finds agrees with what can be seen otherwise, whatever machine this is.

use serde_json::Value;

use crate::program::{Ended, farcall, start};

fn diagnosis(ended: &Ended) -> Value {
    let diagnosis: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    assert_eq!(diagnosis["schema"], "farcall-doctor/1");
    diagnosis
}

fn check<'a>(diagnosis: &'a Value, name: &str) -> &'a Value {
    let checks = diagnosis["checks"].as_array().expect("checks");
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no {name}: {checks:?}"))
}

#[test]
fn every_check_has_a_status_and_a_fix_where_there_is_something_to_fix() {
    let ended = farcall(&["doctor", "--json"]);
    assert_eq!((ended.code(), ended.stderr.as_str()), (0, ""), "{ended:?}");
    let diagnosis = diagnosis(&ended);
    for name in [
        "memfd",
        "huge_pages",
        "cma",
        "pidfd",
        "life",
        "memlock",
        "descriptors",
        "numa",
        "ipv6",
        "io_uring",
        "container",
    ] {
        let check = check(&diagnosis, name);
        let status = check["status"].as_str().expect("a status");
        assert_eq!(status == "ok", check.get("fix").is_none(), "{check}");
        assert!(
            ["ok", "warn", "missing"].contains(&status)
                && check["found"].as_str().is_some_and(|found| !found.is_empty())
        );
    }
    // What these tests themselves use.
    assert_eq!(check(&diagnosis, "ipv4")["status"], "ok");
    let lines = farcall(&["doctor"]);
    assert_eq!((lines.code(), lines.stderr.as_str()), (0, ""), "{lines:?}");
    assert!(lines.stdout.contains("ok      ipv4"), "{}", lines.stdout);
}

/// A limit that is set, a setting that is wrong, a library that is none: each is found, with its remedy.
#[test]
fn planted_faults_are_found() {
    let folder = std::env::temp_dir().join(format!("farcall-doctor-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    std::fs::write(folder.join("libucp.so.0"), "no library").expect("a file");
    std::fs::write(folder.join("libcuda.so.1"), "no driver").expect("a file");
    let libraries = [("LD_LIBRARY_PATH", folder.to_str().expect("UTF-8"))];
    let faults = start(&["doctor", "--json"], &[&libraries[..], &[("FARCALL_DEADLIN", "3s")]].concat()).end();
    assert_eq!((faults.code(), faults.stderr.as_str()), (0, ""), "{faults:?}");
    let found = diagnosis(&faults);
    for (name, says) in [("ucx", "LD_LIBRARY_PATH; the loader says"), ("cuda", "install the NVIDIA driver")] {
        let check = check(&found, name);
        assert!(check["status"] == "missing" && check["fix"].as_str().is_some_and(|fix| fix.contains(says)), "{check}");
    }
    let settings = check(&found, "settings");
    assert!(settings["found"].as_str().is_some_and(|found| found.contains("FARCALL_DEADLINE")), "{settings}");
    std::fs::remove_dir_all(&folder).expect("the folder");

    let shell = [
        "run",
        "-n",
        "1",
        "--",
        "sh",
        "-c",
        "ulimit -n 200 && exec \"$0\" doctor --json",
        env!("CARGO_BIN_EXE_farcall"),
    ];
    let limited = farcall(&shell);
    let descriptors = check(&diagnosis(&limited), "descriptors").clone();
    assert!(
        descriptors["status"] == "warn" && descriptors["found"].as_str().is_some_and(|found| found.starts_with("200"))
    );
}

#[test]
fn what_is_required_and_not_there_is_code_3() {
    assert_eq!(farcall(&["doctor", "--require", "ipv4"]).code(), 0);
    let absent = start(&["doctor", "--require", "settings"], &[("FARCALL_NONSENSE", "1")]).end();
    assert_eq!(absent.code(), 3, "{absent:?}");
    assert!(absent.stderr.contains("not ok: settings"), "{absent:?}");
    let unknown = farcall(&["doctor", "--require", "warp"]);
    assert_eq!(unknown.code(), 2, "{unknown:?}");
    assert!(unknown.stderr.contains("memfd"), "{unknown:?}");
}
