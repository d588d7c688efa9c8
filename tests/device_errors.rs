//! What happens on machines and with arguments that cannot be served.

mod common;

use hybridkv::ErrorKind;
use hybridkv::device::Device;

#[test]
fn a_device_that_is_not_there_is_a_typed_error() {
    let count = Device::cuda_count().unwrap_or(0);
    let error = Device::cuda(count).expect_err("there is one device less than that");
    match error.kind() {
        ErrorKind::NoDriver => assert!(error.to_string().contains("libcuda")),
        ErrorKind::NoDevice { ordinal, count: listed } => {
            assert_eq!((*ordinal, *listed), (count, count));
        }
        other => panic!("unexpected {other:?}"),
    }
}

#[test]
fn memory_that_is_not_there_is_a_typed_error() {
    let mut devices = vec![Device::cpu()];
    devices.extend(common::cuda().cloned());
    for device in devices {
        for result in [device.alloc(1 << 50).err(), device.alloc_pinned(1 << 50).err()] {
            let error = result.expect("no machine has a pebibyte");
            let ErrorKind::OutOfMemory { requested, reason, .. } = error.kind() else {
                panic!("unexpected {error:?}")
            };
            assert_eq!(*requested, 1 << 50);
            assert!(!reason.is_empty());
        }
        let memory = device.alloc(1 << 20).expect("nothing was lost");
        assert_eq!(memory.len(), 1 << 20);
    }
}

#[test]
fn streams_and_events_of_two_devices_do_not_mix() {
    let (one, two) = (Device::cpu(), Device::cpu());
    let stream = one.stream().unwrap();
    let event = two.event().unwrap();
    for result in [stream.as_ref().record(&event), stream.as_ref().wait(&event)] {
        assert!(matches!(result.unwrap_err().kind(), ErrorKind::InvalidArgument(_)));
    }
}
