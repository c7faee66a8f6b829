//! The attributes of a launch, as the driver takes them.

use cudarc::driver::sys;
use cudarc::driver::sys::CUlaunchAttributeID_enum as Id;
use cudarc::driver::sys::{CUlaunchAttribute, CUlaunchAttributeValue};

fn zeroed() -> CUlaunchAttributeValue {
    CUlaunchAttributeValue { pad: [0; 64] }
}

pub(super) fn cluster(blocks: u32) -> CUlaunchAttribute {
    let mut value = zeroed();
    value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: blocks, y: 1, z: 1 };
    CUlaunchAttribute { id: Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, pad: [0; 4], value }
}

pub(super) fn cooperative() -> CUlaunchAttribute {
    let mut value = zeroed();
    value.cooperative = 1;
    CUlaunchAttribute { id: Id::CU_LAUNCH_ATTRIBUTE_COOPERATIVE, pad: [0; 4], value }
}

pub(super) fn dependent() -> CUlaunchAttribute {
    let mut value = zeroed();
    value.programmaticStreamSerializationAllowed = 1;
    CUlaunchAttribute { id: Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, pad: [0; 4], value }
}
