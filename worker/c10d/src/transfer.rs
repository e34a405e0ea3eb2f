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

/// Writes these values over `to`, a dense vector of as many of their kind. On a GPU what was launched before still reads
/// the old ones.
///
/// # Errors
/// When `to` is no such vector, or memory is out.
pub fn upload_into<T: Element>(values: &[T], to: &Tensor) -> Result<()> {
    let operation = || format!("copying {} values into a tensor", values.len());
    let fits = to.defined()
        && to.kind() == T::KIND
        && to.size() == [values.len() as i64]
        && to.is_contiguous()
        && matches!(to.device(), Device::Cpu | Device::Cuda(_));
    if !fits {
        let text = match to.defined() {
            true => format!("it is {:?} {:?} on {:?}, not {:?}", to.size(), to.kind(), to.device(), T::KIND),
            false => "it is undefined".to_owned(),
        };
        return Err(Error::invalid(operation(), text));
    }
    let host = Tensor::f_from_slice(values).map_err(|e| Error::of_libtorch(operation(), &e))?;
    // SAFETY: two live tensors of one size and kind.
    check(unsafe { ffi::af_upload_into(pointer(&host), pointer(to)) }, operation)
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

    #[test]
    fn values_are_written_over_a_tensor_that_takes_them_and_no_other() {
        let to = Tensor::from_slice(&[1_i32, 2, 3]);
        let part = to.narrow(0, 1, 2);
        upload_into(&[7_i32, 8], &part).unwrap();
        upload_into::<i32>(&[], &to.narrow(0, 3, 0)).unwrap();
        assert_eq!(Vec::<i32>::try_from(&to).unwrap(), [1, 7, 8]);
        let apart = Tensor::from_slice(&[0_i32; 4]).slice(0, 0, 4, 2);
        for refused in
            [upload_into(&[1_i32], &to), upload_into(&[1_i64; 3], &to), upload_into(&[1; 2], &apart)]
        {
            let error = refused.unwrap_err();
            assert_eq!(error.kind, crate::ErrorKind::InvalidArgument, "{error}");
        }
        assert!(upload_into(&[1_i32], &Tensor::new()).is_err());
        assert_eq!(Vec::<i32>::try_from(&to).unwrap(), [1, 7, 8]);
    }
}
