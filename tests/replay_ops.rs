//! `hybridkv replay`: the language-neutral cases as operations, every fault of every transfer, and input that is
//! no operation, which changes nothing.
#![cfg(feature = "cli")]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use proptest::prelude::*;
use serde_json::{Value, json};

/// A session: one line in, one line out.
struct Session {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Session {
    fn new() -> Self {
        let binary = std::env::var_os("HYBRIDKV_BIN");
        let mut child =
            Command::new(binary.unwrap_or_else(|| env!("CARGO_BIN_EXE_hybridkv").into()))
                .arg("replay")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .expect("the binary runs");
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, input, output }
    }

    fn with(config: Value) -> Self {
        let mut session = Self::new();
        let mut line = json!({ "op": "config" });
        line.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
        let answer = session.send(line);
        assert_eq!(answer["ok"], true, "{answer}");
        session
    }

    fn send(&mut self, op: Value) -> Value {
        self.send_bytes(op.to_string().as_bytes())
    }

    fn send_bytes(&mut self, line: &[u8]) -> Value {
        self.input.write_all(line).unwrap();
        self.input.write_all(b"\n").unwrap();
        self.input.flush().unwrap();
        let mut answer = String::new();
        self.output.read_line(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap_or_else(|_| panic!("{line:?}: {answer:?}"))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether `answer` has everything that is expected of it.
fn has(answer: &Value, expected: &Value) -> bool {
    match (answer, expected) {
        (Value::Object(answer), Value::Object(expected)) => expected
            .iter()
            .all(|(key, value)| answer.get(key).is_some_and(|given| has(given, value))),
        _ => answer == expected,
    }
}

#[test]
fn the_cases_hold() {
    let text = include_str!("fixtures/semantics/replay.json");
    let file: Value = serde_json::from_str(text).unwrap();
    for case in file["cases"].as_array().unwrap() {
        let mut session = Session::new();
        for (n, step) in case["steps"].as_array().unwrap().iter().enumerate() {
            let answer = session.send(step[0].clone());
            assert!(
                has(&answer, &step[1]),
                "{}, step {n}: {}\nexpected {}\nanswer   {answer}",
                case["id"],
                step[0],
                step[1]
            );
        }
    }
}

/// A host tier that holds a prompt of three blocks which the device has lost. Faults of stores come first.
fn offloaded(store: Option<&str>) -> Session {
    let mut s = Session::with(json!({
        "block_size": 16, "num_blocks": 9, "groups": [{"kind": "full"}], "host": {"blocks": 32},
    }));
    assert_eq!(s.send(json!({"op": "allocate", "id": 1, "tokens": prompt()}))["ok"], true);
    if let Some(kind) = store {
        // Of the second of three.
        s.send(json!({"op": "advance", "id": 1, "computed": 49}));
        s.send(json!({"op": "tick", "n": 1}));
        s.send(json!({"op": "fault", "where": "store", "kind": kind, "count": 1}));
    }
    s.send(json!({"op": "advance", "id": 1, "computed": 49}));
    s.send(json!({"op": "tick"}));
    s.send(json!({"op": "free", "id": 1}));
    let flood: Vec<u32> = (1000..1128).collect();
    assert_eq!(s.send(json!({"op": "allocate", "id": 2, "tokens": flood}))["ok"], true);
    s.send(json!({"op": "free", "id": 2}));
    s
}

fn prompt() -> Vec<u32> {
    (0..49).collect()
}

#[test]
fn no_fault_lets_wrong_bytes_be_served() {
    for kind in ["fail", "short", "corrupt"] {
        let mut s = offloaded(None);
        s.send(json!({"op": "fault", "where": "load", "kind": kind, "count": 1}));
        let answer = s.send(json!({"op": "allocate", "id": 3, "tokens": prompt()}));
        assert_eq!((&answer["hit_tokens"], &answer["ready"]), (&json!(48), &json!(false)));
        let answer = s.send(json!({"op": "tick"}));
        assert_eq!(answer["failed"], json!([{"id": 3, "valid_tokens": 0}]), "{kind}");
    }
    // A store that is known to have failed leaves a hole; one that lies is found out by the load.
    for (kind, hit) in [("fail", 16), ("short", 16), ("corrupt", 48)] {
        let mut s = offloaded(Some(kind));
        let answer = s.send(json!({"op": "allocate", "id": 3, "tokens": prompt()}));
        assert_eq!(answer["hit_tokens"], hit, "{kind}");
        let answer = s.send(json!({"op": "tick"}));
        match kind {
            "corrupt" => assert_eq!(answer["failed"], json!([{"id": 3, "valid_tokens": 16}])),
            _ => assert_eq!(answer["ready"], json!([3])),
        }
    }
}

#[test]
fn write_back_stores_what_is_evicted() {
    let mut s = Session::with(json!({
        "block_size": 16, "num_blocks": 9, "groups": [{"kind": "full"}],
        "host": {"blocks": 32, "write": "write_back"},
    }));
    s.send(json!({"op": "allocate", "id": 1, "tokens": prompt()}));
    s.send(json!({"op": "advance", "id": 1, "computed": 49}));
    assert_eq!(s.send(json!({"op": "tick"}))["ended"], 0);
    s.send(json!({"op": "free", "id": 1}));
    let flood: Vec<u32> = (1000..1128).collect();
    assert_eq!(s.send(json!({"op": "allocate", "id": 2, "tokens": flood}))["ok"], true);
    s.send(json!({"op": "free", "id": 2}));
    let answer = s.send(json!({"op": "lookup", "tokens": prompt()}));
    assert_eq!((&answer["hit_tokens"], &answer["device_hit_tokens"]), (&json!(48), &json!(0)));
    // A store that does not end keeps its block from reuse.
    s.send(json!({"op": "fault", "where": "store", "kind": "delay", "count": 99}));
    let answer = s.send(json!({"op": "allocate", "id": 3, "tokens": [1, 2, 3]}));
    assert_eq!(answer, json!({"ok": false, "error": "no_free_blocks"}));
}

/// A folder that goes with its test.
struct Folder(std::path::PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("hybridkv-replay-{}-{name}", std::process::id())))
    }

    fn session(&self) -> Session {
        Session::with(json!({
            "block_size": 16, "num_blocks": 9, "groups": [{"kind": "full"}],
            "host": {"blocks": 8}, "storage": {"path": self.0, "bytes": 1 << 20},
        }))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The prompt computed, stored in every tier, and lost by device and host.
fn persisted(folder: &Folder, write: Option<&str>) -> Session {
    let mut s = folder.session();
    assert_eq!(s.send(json!({"op": "allocate", "id": 1, "tokens": prompt()}))["ok"], true);
    s.send(json!({"op": "advance", "id": 1, "computed": 49}));
    if let Some(kind) = write {
        let fault = json!({"op": "fault", "where": "storage_write", "kind": kind, "count": 1});
        assert_eq!(s.send(fault)["ok"], true);
    }
    assert_eq!(s.send(json!({"op": "tick"}))["ended"], 6, "offloads and persists");
    s.send(json!({"op": "free", "id": 1}));
    let flood: Vec<u32> = (1000..1128).collect();
    assert_eq!(s.send(json!({"op": "allocate", "id": 2, "tokens": flood}))["ok"], true);
    s.send(json!({"op": "advance", "id": 2, "computed": 128}));
    s.send(json!({"op": "tick"}));
    s.send(json!({"op": "free", "id": 2}));
    s
}

#[test]
fn storage_serves_what_device_and_host_have_lost() {
    let folder = Folder::new("serves");
    let mut s = persisted(&folder, None);
    let answer = s.send(json!({"op": "lookup", "tokens": prompt()}));
    assert_eq!(answer["tiers"], json!({"device": 0, "host": 0, "storage": 48}), "{answer}");
    let answer = s.send(json!({"op": "allocate", "id": 3, "tokens": prompt()}));
    assert_eq!((&answer["loads"], &answer["ready"]), (&json!([3]), &json!(false)), "{answer}");
    assert_eq!(s.send(json!({"op": "tick"}))["ready"], json!([3]));
    assert_eq!(s.send(json!({"op": "state"}))["tiers"]["storage"]["blocks"], 11);
    s.send(json!({"op": "free", "id": 3}));
    drop(s);
    // Another process finds it; a reset empties it for good.
    let mut s = folder.session();
    let answer = s.send(json!({"op": "lookup", "tokens": prompt()}));
    assert_eq!(answer["tiers"]["storage"], 48, "{answer}");
    assert_eq!(s.send(json!({"op": "reset_prefix_cache"}))["ok"], true);
    assert_eq!(s.send(json!({"op": "lookup", "tokens": prompt()}))["hit_tokens"], 0);
    drop(s);
    let mut s = folder.session();
    assert_eq!(s.send(json!({"op": "lookup", "tokens": prompt()}))["hit_tokens"], 0);
}

#[test]
fn no_fault_of_storage_lets_wrong_bytes_be_served() {
    for (place, kind) in ["fail", "short", "corrupt"]
        .into_iter()
        .flat_map(|kind| [("storage_read", kind), ("storage_write", kind)])
    {
        let folder = Folder::new(&format!("{place}-{kind}"));
        let mut s = persisted(&folder, (place == "storage_write").then_some(kind));
        if place == "storage_read" {
            let fault = json!({"op": "fault", "where": place, "kind": kind, "count": 1});
            assert_eq!(s.send(fault)["ok"], true);
        }
        let answer = s.send(json!({"op": "allocate", "id": 3, "tokens": prompt()}));
        // A write that is known to have failed is no hit; what lies is found out by the read.
        let known = place == "storage_write" && kind == "fail";
        assert_eq!(answer["hit_tokens"], if known { 0 } else { 48 }, "{place} {kind}: {answer}");
        let answer = s.send(json!({"op": "tick"}));
        let failed = json!([{"id": 3, "valid_tokens": 0}]);
        assert_eq!(answer["failed"], if known { json!([]) } else { failed }, "{place} {kind}");
    }
}

#[test]
fn forked_sequences_share_what_they_do_not_write() {
    let mut s = Session::with(json!({
        "block_size": 4, "num_blocks": 17, "groups": [{"kind": "full"}], "host": {"blocks": 8},
    }));
    s.send(json!({"op": "allocate", "id": "a", "tokens": [1, 2, 3, 4, 5, 6]}));
    assert_eq!(s.send(json!({"op": "fork", "id": "b", "from": "a"}))["ok"], false, "not computed");
    s.send(json!({"op": "advance", "id": "a", "computed": 6}));
    let answer = s.send(json!({"op": "fork", "id": "b", "from": "a"}));
    assert_eq!(answer, json!({"ok": true, "tokens": 6, "blocks": [[1, 2]]}));
    assert_eq!(s.send(json!({"op": "fork", "id": "b", "from": "a"}))["ok"], false);
    // Who goes on first moves onto a copy of the tail block.
    let answer = s.send(json!({"op": "append", "id": "b", "tokens": [7]}));
    assert_eq!(answer["new_blocks"], json!([[3]]));
    let answer = s.send(json!({"op": "append", "id": "a", "tokens": [8]}));
    assert_eq!(answer["new_blocks"], json!([[]]));
    assert_eq!(s.send(json!({"op": "state"}))["ref_counts"], json!({"1": 2, "2": 1, "3": 1}));
    let answer = s.send(json!({"op": "trim", "id": "b", "tokens": 4}));
    assert_eq!((&answer["freed"], &answer["dependents"]), (&json!([[3]]), &json!([])));
    assert_eq!(s.send(json!({"op": "rollback", "id": "b", "tokens": 9}))["ok"], false);
    assert_eq!(s.send(json!({"op": "free", "id": "a"}))["ok"], true);
    assert_eq!(s.send(json!({"op": "state"}))["ref_counts"], json!({"1": 1}));
}

#[test]
fn preempted_sequences_come_back_as_they_were_or_compute_what_was_lost() {
    for fault in [None, Some("fail"), Some("short"), Some("corrupt")] {
        let mut s = Session::with(json!({
            "block_size": 4, "num_blocks": 9, "host": {"blocks": 8},
            "groups": [{"kind": "full"}, {"kind": "sliding", "window": 3}],
        }));
        let op = |op: &str| json!({"op": op, "id": "a"});
        s.send(json!({"op": "allocate", "id": "a", "tokens": [1, 2, 3, 4, 5, 6, 7, 8, 9]}));
        assert_eq!(s.send(op("preempt"))["ok"], false, "not computed");
        s.send(json!({"op": "advance", "id": "a", "computed": 9}));
        s.send(json!({"op": "tick"}));
        // The partly filled tails are what the host does not have.
        let answer = s.send(op("preempt"));
        let expected = json!({"ok": true, "tokens": 9, "offloads": 2, "dependents": []});
        assert_eq!(answer, expected);
        assert_eq!(s.send(json!({"op": "append", "id": "a", "tokens": [10]}))["ok"], false);
        assert_eq!(s.send(op("resume"))["ok"], false, "still being stored");
        s.send(json!({"op": "tick"}));
        assert_eq!(s.send(json!({"op": "state"}))["ref_counts"], json!({}));
        let flood: Vec<u32> = (100..116).collect();
        s.send(json!({"op": "allocate", "id": "b", "tokens": flood}));
        s.send(json!({"op": "abort", "id": "b"}));
        if let Some(kind) = fault {
            s.send(json!({"op": "fault", "where": "load", "kind": kind, "count": 1}));
        }
        let answer = s.send(op("resume"));
        assert_eq!((&answer["hit_tokens"], &answer["ready"]), (&json!(9), &json!(false)));
        let answer = s.send(json!({"op": "tick"}));
        let valid = match fault {
            None => {
                assert_eq!((&answer["ready"], &answer["failed"]), (&json!(["a"]), &json!([])));
                9
            }
            // Of the first block.
            Some(_) => {
                assert_eq!(answer["failed"], json!([{"id": "a", "valid_tokens": 0}]));
                0
            }
        };
        for computed in valid..=9 {
            let advanced = s.send(json!({"op": "advance", "id": "a", "computed": computed}));
            assert_eq!(advanced["ok"], true);
        }
        assert_eq!(s.send(json!({"op": "append", "id": "a", "tokens": [10, 11, 12]}))["ok"], true);
        assert_eq!(s.send(op("free"))["ok"], true);
    }
}

#[test]
fn a_delayed_load_ends_with_the_next_tick() {
    let mut s = offloaded(None);
    s.send(json!({"op": "fault", "where": "load", "kind": "delay", "count": 1}));
    s.send(json!({"op": "allocate", "id": 3, "tokens": prompt()}));
    let answer = s.send(json!({"op": "tick"}));
    assert_eq!((&answer["ended"], &answer["ready"]), (&json!(2), &json!([])));
    let refused = s.send(json!({"op": "append", "id": 3, "tokens": [7]}));
    assert_eq!(refused["ok"], false, "it is not known yet what it has");
    let answer = s.send(json!({"op": "tick"}));
    assert_eq!((&answer["ended"], &answer["ready"]), (&json!(1), &json!([3])));
    // The name may be used again while transfers of its last owner are on their way.
    let mut s = offloaded(None);
    s.send(json!({"op": "allocate", "id": 3, "tokens": prompt()}));
    s.send(json!({"op": "free", "id": 3}));
    s.send(json!({"op": "allocate", "id": 3, "tokens": [5, 5]}));
    assert_eq!(s.send(json!({"op": "tick"}))["ready"], json!([]));
    assert_eq!(s.send(json!({"op": "append", "id": 3, "tokens": [7]}))["ok"], true);
}

#[test]
fn lines_that_are_no_operations_are_answered() {
    let mut s = Session::new();
    let config =
        json!({"op": "config", "block_size": 4, "num_blocks": 9, "groups": [{"kind": "full"}]});
    assert_eq!(s.send(json!({"op": "state"}))["ok"], false, "before config");
    for (key, value) in [
        ("block_size", json!(0)),
        ("num_blocks", json!(1)),
        ("num_blocks", json!(u32::MAX)),
        ("groups", json!([])),
        ("groups", json!([{"kind": "sliding"}])),
        ("groups", json!([{"kind": "sliding", "window": 0}])),
        ("groups", json!([{"kind": "full", "window": 4}])),
        ("groups", json!([{"kind": "round"}])),
        ("retention_interval", json!(3)),
        ("max_model_len", json!(0)),
        ("host", json!({"blocks": -1})),
        ("typo", json!(1)),
    ] {
        let mut wrong = config.clone();
        wrong[key] = value;
        let answer = s.send(wrong.clone());
        assert_eq!(answer["ok"], false, "{wrong}");
    }
    assert_eq!(s.send(config.clone())["ok"], true);
    s.send(json!({"op": "allocate", "id": "a", "tokens": [1, 2, 3, 4, 5]}));
    let before = s.send(json!({"op": "state"}));
    for line in [
        &b""[..],
        b"{",
        b"[]",
        b"7",
        b"\xff\xfe",
        b"{\"op\":\"allocate\"}",
        b"{\"op\":\"allocate\",\"id\":\"b\",\"tokens\":[]}",
        b"{\"op\":\"allocate\",\"id\":\"b\",\"tokens\":[1.5]}",
        b"{\"op\":\"allocate\",\"id\":\"b\",\"tokens\":[-1]}",
        b"{\"op\":\"allocate\",\"id\":\"b\",\"tokens\":{\"runs\":[[1,18446744073709551615],[1,1]]}}",
        b"{\"op\":\"allocate\",\"id\":\"b\",\"tokens\":{\"runs\":[[1,99999999999]]}}",
        b"{\"op\":\"allocate\",\"id\":\"b\",\"tokens\":[1],\"lookahead\":18446744073709551615}",
        b"{\"op\":\"allocate\",\"id\":\"b\",\"tokens\":[1],\"num_tokens\":18446744073709551615}",
        b"{\"op\":\"allocate\",\"id\":\"a\",\"tokens\":[1]}",
        b"{\"op\":\"allocate\",\"id\":[1],\"tokens\":[1]}",
        b"{\"op\":\"lookup\",\"id\":\"b\",\"tokens\":[]}",
        b"{\"op\":\"append\",\"id\":\"a\",\"tokens\":[]}",
        b"{\"op\":\"append\",\"id\":\"b\",\"tokens\":[1]}",
        b"{\"op\":\"advance\",\"id\":\"a\",\"computed\":6}",
        b"{\"op\":\"advance\",\"id\":\"a\",\"computed\":2,\"settled\":3}",
        b"{\"op\":\"forget\",\"id\":\"a\",\"group\":1,\"block_index\":0}",
        b"{\"op\":\"fault\",\"where\":\"store\",\"kind\":\"fail\",\"count\":1}",
        b"{\"op\":\"free\",\"id\":\"b\"}",
        b"{\"op\":\"free\",\"id\":\"a\",\"id\":\"a\"}",
        b"{\"op\":\"free\",\"id\":\"a\",\"typo\":1}",
    ] {
        let answer = s.send_bytes(line);
        let line = String::from_utf8_lossy(line);
        assert_eq!((&answer["ok"], answer["error"].is_string()), (&json!(false), true), "{line}");
        assert_eq!(s.send(json!({"op": "state"})), before, "{line}");
    }
    assert_eq!(s.send(config)["ok"], false, "a second config");
    // What is not there needs no forgetting.
    let answer = s.send(json!({"op": "forget", "id": "a", "group": 0, "block_index": 99}));
    assert_eq!(answer["ok"], true);
}

/// One operation on few names and few tokens; now and then a broken one.
fn operation() -> impl Strategy<Value = Value> {
    let id = prop_oneof![(0..4u64).prop_map(|n| json!(n)), Just(json!("x"))];
    let tokens = || {
        let runs = prop::collection::vec((0..3u32, 0..30usize), 0..4);
        prop_oneof![
            9 => runs.prop_map(|runs| json!({ "runs": runs })),
            1 => Just(json!("tokens")),
        ]
    };
    let place = prop::sample::select(vec!["store", "load", "storage_read", "nowhere"]);
    let kind = prop::sample::select(vec!["fail", "short", "corrupt", "delay"]);
    let number = || prop_oneof![8 => 0..60u64, 1 => Just(u64::MAX)];
    prop_oneof![
        4 => (id.clone(), tokens(), number(), 0..9u64).prop_map(|(id, tokens, n, lookahead)| json!({
            "op": "allocate", "id": id, "tokens": tokens, "num_tokens": n, "lookahead": lookahead,
        })),
        1 => (id.clone(), tokens()).prop_map(|(id, tokens)| json!({
            "op": "lookup", "id": id, "tokens": tokens, "salt": "s",
        })),
        3 => (id.clone(), tokens())
            .prop_map(|(id, tokens)| json!({ "op": "append", "id": id, "tokens": tokens })),
        4 => (id.clone(), number(), number()).prop_map(|(id, computed, settled)| json!({
            "op": "advance", "id": id, "computed": computed, "settled": settled,
        })),
        2 => id.clone().prop_map(|id| json!({ "op": "free", "id": id })),
        1 => (id.clone(), id.clone())
            .prop_map(|(id, from)| json!({ "op": "fork", "id": id, "from": from })),
        1 => (id.clone(), number(), prop::sample::select(vec!["trim", "rollback"]))
            .prop_map(|(id, n, op)| json!({ "op": op, "id": id, "tokens": n })),
        1 => id.clone().prop_map(|id| json!({ "op": "abort", "id": id })),
        2 => (id.clone(), prop::sample::select(vec!["preempt", "resume"]))
            .prop_map(|(id, op)| json!({ "op": op, "id": id })),
        1 => (id, 0..4u64, number()).prop_map(|(id, group, index)| json!({
            "op": "forget", "id": id, "group": group, "block_index": index,
        })),
        2 => (0..5u64).prop_map(|n| json!({ "op": "tick", "n": n })),
        1 => (place, kind, 0..3u32).prop_map(|(place, kind, count)| json!({
            "op": "fault", "where": place, "kind": kind, "count": count,
        })),
        1 => prop::sample::select(vec!["reset_prefix_cache", "events", "stats", "tick", "nothing"])
            .prop_map(|op| json!({ "op": op })),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever comes, there is an answer, and a refusal leaves the state as it was.
    #[test]
    fn a_refused_operation_changes_nothing(
        ops in prop::collection::vec(operation(), 1..60),
        host in prop::option::of(1..20u32),
        mix in 0..5usize,
    ) {
        let groups = [
            json!([{"kind": "full"}]),
            json!([{"kind": "full"}, {"kind": "sliding", "window": 6, "sink_tokens": 1}]),
            json!([{"kind": "full", "block_size": 8}, {"kind": "chunked", "chunk": 12}]),
            json!([{"kind": "sliding", "window": 9}]),
            json!([{"kind": "full"}, {"kind": "state"}]),
        ];
        let mut config = json!({ "block_size": 4, "num_blocks": 24, "groups": groups[mix] });
        if let Some(blocks) = host {
            config["host"] = json!({ "blocks": blocks });
        }
        let mut s = Session::with(config);
        let mut before = s.send(json!({"op": "state"}));
        for op in ops {
            let answer = s.send(op.clone());
            let after = s.send(json!({"op": "state"}));
            if answer["ok"] != true {
                prop_assert_eq!(&after, &before, "{} answered {}", op, answer);
            }
            before = after;
        }
    }
}
