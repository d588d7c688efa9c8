//! Executes the manager's transfers on a device: owns streams, events and the host arena.
