//! A device as core and people know it.

use minisgl_core::backend::{DeviceInfo, Element};
use minisgl_core::kv::KvFormat;

use crate::context::Properties;
use crate::memory::element_bytes;
use crate::weight::SLICING;

/// The smallest page, in tokens, that the attention kernels take.
const PAGE_SIZE_MIN: u32 = 16;

/// Such a device as people name it.
pub(crate) fn info_of(properties: &Properties) -> DeviceInfo {
    DeviceInfo {
        name: properties.name.clone(),
        activation_bytes: element_bytes(Element::Activation),
        kv: KvFormat::Bf16,
        logit_bytes: element_bytes(Element::Logit),
        page_size_min: PAGE_SIZE_MIN,
        slicing: SLICING,
    }
}
