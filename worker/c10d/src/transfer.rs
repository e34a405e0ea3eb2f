//! Values from the host onto a device. Called by the model, the engine and the learner for all that a pass reads.
//!
//! What must stay true: nobody waits for a copy to a GPU. It goes through pinned memory and lies, in the GPU's own order
//! of work, before whatever reads it.

use std::ffi::c_int;

use tch::kind::Element;
use tch::{Device, Tensor};

use crate::error::check;
use crate::group::pointer;
use crate::{Error, Result, ffi};

/// A vector of these values on the device.
///
/// # Errors
/// When the device is no CPU and no GPU that libtorch can use, or memory is out.
pub fn upload<T: Element>(values: &[T], device: Device) -> Result<Tensor> {
    let operation = || format!("copying {} values to {device:?}", values.len());
    let host = Tensor::f_from_slice(values).map_err(|e| Error::of_libtorch(operation(), &e))?;
    let index = match device {
        Device::Cpu => return Ok(host),
        Device::Cuda(index) => c_int::try_from(index).ok(),
        _ => None,
    };
    let Some(index) = index else { return Err(Error::invalid(operation(), "it must be the CPU or a GPU")) };
    let mut out = std::ptr::null_mut();
    // SAFETY: a live tensor and an out-pointer to a live local.
    check(unsafe { ffi::af_upload(pointer(&host), index, &raw mut out) }, operation)?;
    // SAFETY: on success the shim has stored a new `torch::Tensor*` there, ours from now on.
    Ok(unsafe { Tensor::from_ptr(out.cast()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_arrive_or_the_device_is_named() {
        assert_eq!(Vec::<i64>::try_from(upload(&[3_i64, -1], Device::Cpu).unwrap()).unwrap(), [3, -1]);
        // No test machine has so many GPUs; without any it is libtorch that says so.
        for device in [Device::Cuda(4000), Device::Mps] {
            let error = upload(&[1_i32], device).unwrap_err().to_string();
            assert!(error.starts_with(&format!("copying 1 values to {device:?} failed")), "{error}");
        }
    }
}
