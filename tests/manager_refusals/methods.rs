//! Every public method of the manager: how it is called, and when it may be refused.

use hybridkv::Error;
use hybridkv::manager::{ExtraKeys, Manager, Stats, Tier};
use hybridkv::spec::GroupKind;

use super::inputs::{Args, MOST, config, raw};
use super::known::{CAPACITY, Managed, Sequence};
use super::{Method, Reasons, all_are_named, never, show, what_is_refused_has_never_been, when};

fn method(
    name: &'static str,
    weight: u32,
    call: fn(&mut Managed, &Args) -> Result<String, Error>,
    reasons: fn(&Managed, &Args) -> Reasons,
) -> Method<Managed> {
    Method { name, weight, call, reasons }
}

/// One that is never refused, whatever it is given.
fn total(
    name: &'static str,
    weight: u32,
    call: fn(&mut Managed, &Args) -> Result<String, Error>,
) -> Method<Managed> {
    method(name, weight, call, |_, _| never())
}

/// Every public method of the manager.
fn methods() -> Vec<Method<Managed>> {
    let unknown = |s: &Managed, a: &Args| when(!s.is_taken(a.seq), "UnknownSequence");
    let goes_back = |s: &Managed, a: &Args| when(a.now < s.now, "InvalidArgument");
    vec![
        method("allocate", 30, |s, a| s.allocate(a, a.raw.tokens.len().max(1)), Managed::of_new),
        method(
            "allocate_prefill",
            10,
            |s, a| s.allocate(a, a.n),
            |s, a| s.of_new(a).when(a.n == 0, "InvalidArgument"),
        ),
        method(
            "allocate_hashed",
            10,
            |s, a| {
                let given = s.m.allocate_hashed(a.seq, s.hashed(a), a.m)?;
                s.placed(a.seq, &given);
                show(Ok(given))
            },
            |s, a| s.of_new(a).when(s.is_foreign(a), "InvalidArgument"),
        ),
        method(
            "append",
            15,
            |s, a| {
                let given = s.m.append(a.seq, &a.raw.tokens)?;
                s.live.get_mut(&a.seq).unwrap().len += a.raw.tokens.len();
                show(Ok(given))
            },
            Managed::why_not_append,
        ),
        method(
            "append_with",
            5,
            |s, a| {
                let mut taken = Vec::new();
                s.m.append_with(a.seq, &a.raw.tokens, |g, id| taken.push((g, id)))?;
                s.live.get_mut(&a.seq).unwrap().len += a.raw.tokens.len();
                show(Ok(taken))
            },
            Managed::why_not_append,
        ),
        method(
            "advance",
            60,
            |s, a| {
                let freed = s.m.advance(a.seq, a.n, a.m)?;
                s.advanced(a);
                show(Ok(freed))
            },
            Managed::why_not_advance,
        ),
        method(
            "advance_with",
            10,
            |s, a| {
                let mut freed = Vec::new();
                s.m.advance_with(a.seq, a.n, a.m, |g, id| freed.push((g, id)))?;
                s.advanced(a);
                show(Ok(freed))
            },
            Managed::why_not_advance,
        ),
        method("free", 10, |s, a| show(s.m.free(a.seq)).inspect(|_| s.ended(a.seq)), unknown),
        method("abort", 5, |s, a| show(s.m.abort(a.seq)).inspect(|_| s.ended(a.seq)), unknown),
        method(
            "prioritize",
            2,
            |s, a| show(s.m.prioritize(a.seq, a.raw.odd)),
            |s, a| s.of_live(a.seq, |_| false),
        ),
        method(
            "reserve",
            2,
            |s, a| show(s.m.reserve(a.seq, a.n)),
            |s, a| {
                let live = s.live.contains_key(&a.seq);
                s.of_live(a.seq, |_| false).when(live && a.n > MOST as usize, "TooLong")
            },
        ),
        method("block_row", 1, |s, a| show(s.m.block_row(a.seq, a.raw.group)), Managed::of_group),
        method("table", 1, |s, a| show(s.m.table(a.seq, a.raw.group)), Managed::of_group),
        method("loading", 1, |s, a| show(s.m.loading(a.seq, a.raw.group)), Managed::of_group),
        method(
            "overlap",
            20,
            |s, a| {
                s.m.overlap(a.seq)?;
                let sequence = s.live.get_mut(&a.seq).unwrap();
                sequence.behind |= sequence.loading;
                show(Ok(()))
            },
            |s, a| {
                let waiting: &[&str] = match s.live.get(&a.seq) {
                    Some(sequence) if sequence.loading => &["NotReady"],
                    _ => &[],
                };
                s.of_live(a.seq, |_| false).or(waiting)
            },
        ),
        method("forget", 2, |s, a| show(s.m.forget(a.seq, a.raw.group, a.n)), Managed::of_group),
        method(
            "state_step",
            50,
            |s, a| show(s.m.state_step(a.seq, a.raw.group, a.m, a.n)),
            |s, a| {
                let groups = &s.m.config().groups;
                let group = groups.get(a.raw.group);
                let kind = group.is_none_or(|group| group.kind != GroupKind::State);
                let wrong = |s: &Sequence| a.m != s.computed || a.n <= a.m || a.n > s.len;
                s.of_live(a.seq, |s| kind || wrong(s))
            },
        ),
        method(
            "fork",
            10,
            |s, a| {
                let shared = s.m.fork(a.seq, a.other)?;
                let child = Sequence { len: shared, ..s.live[&a.seq] };
                s.live.insert(a.other, child);
                s.prefetched.remove(&a.other);
                show(Ok(shared))
            },
            |s, a| {
                let left = |of: &Sequence| s.has_states() && of.computed < of.len;
                s.of_live(a.seq, |of| of.loading || of.computed == 0 || left(of))
                    .when(s.is_taken(a.other), "DuplicateSequence")
            },
        ),
        method(
            "trim",
            5,
            |s, a| show(s.m.trim(a.seq, a.n)).inspect(|_| s.cut(a)),
            Managed::why_not_cut,
        ),
        method(
            "rollback",
            5,
            |s, a| show(s.m.rollback(a.seq, a.n)).inspect(|_| s.cut(a)),
            Managed::why_not_cut,
        ),
        method(
            "preempt",
            40,
            |s, a| {
                let given = s.m.preempt(a.seq)?;
                let sequence = s.live.remove(&a.seq).unwrap();
                s.swapped.insert(a.seq, sequence);
                show(Ok(given))
            },
            |s, a| {
                let running = |of: &Sequence| of.loading || !of.begun || of.settled < of.computed;
                s.of_live(a.seq, |of| of.computed == 0 || running(of) || !s.host)
                    .or(&["NoHostSlots"])
            },
        ),
        method(
            "resume",
            40,
            |s, a| {
                let given = s.m.resume(a.seq)?;
                s.swapped.remove(&a.seq);
                s.placed(a.seq, &given);
                show(Ok(given))
            },
            |s, a| {
                let unknown = !s.swapped.contains_key(&a.seq);
                when(unknown, "UnknownSequence").or(&CAPACITY).or(&["NotReady"])
            },
        ),
        method(
            "prefetch",
            10,
            |s, a| {
                let begun = s.m.prefetch(a.seq, &s.hashed(a), a.now)?;
                s.now = a.now;
                if begun.blocks > 0 {
                    s.prefetched.insert(a.seq);
                }
                show(Ok(begun))
            },
            |s, a| {
                let taken = s.is_taken(a.seq) || s.prefetched.contains(&a.seq);
                when(taken, "DuplicateSequence")
                    .when(a.now < s.now || s.is_foreign(a), "InvalidArgument")
            },
        ),
        method(
            "poll_prefetch",
            3,
            |s, a| show(s.m.poll_prefetch(a.now)).inspect(|_| s.now = a.now),
            goes_back,
        ),
        method("tick", 3, |s, a| show(s.m.tick(a.now)).inspect(|_| s.now = a.now), goes_back),
        method(
            "pin",
            10,
            |s, a| {
                let pin = s.m.pin(a.tier(), &s.hashed(a))?;
                s.pins.insert(pin.id);
                show(Ok(pin))
            },
            |s, a| when(s.is_foreign(a), "InvalidArgument").or(&["PinTooLarge"]),
        ),
        method(
            "unpin",
            15,
            |s, a| {
                s.m.unpin(a.seq)?;
                s.pins.remove(&a.seq);
                show(Ok(()))
            },
            |s, a| when(!s.pins.contains(&a.seq), "UnknownPin"),
        ),
        method(
            "set_quota",
            5,
            |s, a| show(s.m.set_quota(a.tier(), a.keys().salt, a.quota())),
            |_, a| when(a.tier() == Tier::Device, "Unsupported"),
        ),
        total("quota_used", 1, |s, a| show(Ok(s.m.quota_used(a.tier(), a.keys().salt)))),
        total("cancel_prefetch", 3, |s, a| {
            let was = s.prefetched.remove(&a.seq);
            assert_eq!(s.m.cancel_prefetch(a.seq), was);
            show(Ok(was))
        }),
        method(
            "attach_storage",
            10,
            |s, a| {
                let (config, stored) = a.storage();
                show(s.m.attach_storage(config, &stored)).inspect(|_| s.storage = true)
            },
            |s, a| {
                let there = s.storage || s.m.usage().storage_used > 0;
                when(there || !s.host || (2..6).contains(&a.raw.odd), "InvalidArgument")
                    .when(a.raw.odd == 0, "InvalidArgument")
                    .when(a.raw.odd == 1, "Unsupported")
            },
        ),
        total("detach_storage", 2, |s, _| {
            s.storage = false;
            show(Ok(s.m.detach_storage()))
        }),
        method(
            "attach_host",
            10,
            |s, a| show(s.m.attach_host(a.host())).inspect(|_| s.host = true),
            |s, a| {
                let there = s.host || s.m.usage().host_used > 0;
                when(there || a.raw.odd == 0, "InvalidArgument")
                    .when((1..3).contains(&a.raw.odd), "Unsupported")
            },
        ),
        total("detach_host", 2, |s, _| {
            (s.host, s.storage) = (false, false);
            s.prefetched.clear();
            show(Ok(s.m.detach_host()))
        }),
        total("clear_host", 2, |s, _| {
            s.m.clear_host();
            show(Ok(()))
        }),
        method(
            "set_cost_model",
            3,
            |s, a| show(s.m.set_cost_model(a.cost())),
            |_, a| when(a.raw.odd < 3, "Unsupported"),
        ),
        total("next_transfer", 70, |s, _| {
            let transfer = s.m.next_transfer();
            s.flying.extend(transfer.map(|transfer| transfer.id));
            show(Ok(transfer))
        }),
        total("next_copy", 30, |s, _| show(Ok(s.m.next_copy()))),
        total("next_completion", 1, |s, _| show(Ok(s.m.next_completion()))),
        method(
            "complete",
            70,
            |s, a| {
                let completion = s.m.complete(a.transfer, a.raw.outcome)?;
                s.flying.retain(|&id| id != a.transfer);
                s.hear(completion);
                show(Ok(completion))
            },
            |s, a| when(!s.flying.contains(&a.transfer), "UnknownTransfer"),
        ),
        method(
            "admission",
            3,
            |s, a| show(s.m.admission(a.n, &[(a.seq, a.m)])),
            |s, a| {
                let unknown = !s.live.contains_key(&a.seq);
                when(a.n > MOST as usize, "TooLong")
                    .when(unknown, "UnknownSequence")
                    .or(&["PoolTooSmall"])
            },
        ),
        total("reset_prefix_cache", 2, |s, _| {
            let reset = s.m.reset_prefix_cache();
            s.storage &= !reset;
            if reset {
                s.prefetched.clear();
            }
            show(Ok(reset))
        }),
        total("record_events", 1, |s, _| {
            s.m.record_events(true);
            show(Ok(()))
        }),
        total("events", 1, |s, _| show(Ok(s.m.events()))),
        total("hash", 1, |s, a| show(Ok(s.m.hash(&a.raw.tokens, a.keys())))),
        total("lookup", 1, |s, a| show(Ok(s.m.lookup(&a.raw.tokens, a.keys())))),
        total("lookup_hashed", 3, |s, a| {
            let hit = s.m.lookup_hashed(&s.hashed(a));
            assert!(!s.is_foreign(a) || hit.tokens == 0, "tokens of another identity hit");
            show(Ok(hit))
        }),
        total("tier_tokens", 3, |s, a| {
            // A hit of other tokens, too.
            let hit = s.m.lookup(&[0; 20], ExtraKeys::default());
            show(Ok(s.m.tier_tokens(&s.hashed(a), &hit)))
        }),
        total("block_hashes", 1, |s, a| {
            show(Ok(s.m.block_hashes(a.raw.group, &s.hashed(a)).collect::<Vec<_>>()))
        }),
        total("cached_indices", 1, |s, a| show(Ok(s.m.cached_indices(a.raw.group)))),
        total("max_blocks", 1, |s, a| show(Ok(s.m.max_blocks(a.n)))),
        total("config", 1, |s, _| show(Ok(s.m.config()))),
        total("alignment", 1, |s, _| show(Ok(s.m.alignment()))),
        total("capacity", 1, |s, _| show(Ok(s.m.capacity()))),
        total("free_blocks", 1, |s, _| show(Ok(s.m.free_blocks()))),
        total("hash_unit", 1, |s, _| show(Ok(s.m.hash_unit()))),
        total("stats", 1, |s, _| show(Ok(Stats { refused: 0, ..s.m.stats() }))),
        total("metadata", 1, |s, _| show(Ok(s.m.metadata()))),
        total("usage", 1, |s, _| show(Ok(s.m.usage()))),
        total("free_queue", 1, |s, _| show(Ok(s.m.free_queue()))),
        total("ref_counts", 1, |s, _| show(Ok(s.m.ref_counts()))),
        total("transfers_in_flight", 1, |s, _| show(Ok(s.m.transfers_in_flight()))),
        total("preempted", 1, |s, _| {
            assert_eq!(s.m.preempted(), s.swapped.len());
            show(Ok(s.m.preempted()))
        }),
        total("prometheus", 1, |s, _| {
            let counts_refusals = |line: &&str| !line.contains("refused");
            show(Ok(s.m.prometheus().lines().filter(counts_refusals).count()))
        }),
        // Made again of what it was made of; `configs` has what cannot be.
        total("new", 1, |s, _| show(Ok(Manager::new(s.m.config().clone()).is_ok()))),
        total("oversubscribed", 1, |s, _| {
            show(Manager::oversubscribed(s.m.config().clone()).map(|m| m.capacity()))
        }),
    ]
}
#[test]
fn every_method_of_the_manager_takes_part() {
    all_are_named("Manager", &methods());
}

#[test]
fn a_manager_never_knows_what_it_refused() {
    let refusable = [
        "allocate",
        "allocate_prefill",
        "allocate_hashed",
        "append",
        "append_with",
        "advance",
        "advance_with",
        "free",
        "abort",
        "prioritize",
        "reserve",
        "block_row",
        "table",
        "loading",
        "overlap",
        "pin",
        "unpin",
        "set_quota",
        "forget",
        "state_step",
        "fork",
        "trim",
        "rollback",
        "preempt",
        "resume",
        "prefetch",
        "poll_prefetch",
        "tick",
        "attach_storage",
        "attach_host",
        "set_cost_model",
        "complete",
        "admission",
    ];
    what_is_refused_has_never_been(&methods(), config(), raw(), Managed::new, &refusable);
}
