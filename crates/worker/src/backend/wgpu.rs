//! A GPU through Vulkan, with exact integers in WGSL (`wgpu/product.wgsl`).

use std::borrow::Cow;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use casemate_field::Field;
use casemate_field::digits::DIGITS;
use casemate_wire::Shape;
use wgpu::util::{BufferInitDescriptor, DeviceExt};
use wgpu::{
    BindGroupDescriptor, BindGroupEntry, Buffer, BufferDescriptor, BufferUsages,
    CommandEncoderDescriptor, ComputePassDescriptor, ComputePipeline, ComputePipelineDescriptor,
    MapMode, PollType, PowerPreference, ShaderModuleDescriptor, ShaderSource,
};

use super::{Backend, BackendError, Device};

/// How long a product may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Rows of one workgroup, as in the shader.
const ROWS: u32 = 4;

/// Workgroups in one direction; what every device can do is 65,535.
const MOST_GROUPS: u32 = 32_768;

/// A GPU.
pub struct Wgpu {
    shared: Arc<Shared>,
    name: String,
    hardware: bool,
}

struct Shared {
    device: wgpu::Device,
    queue: wgpu::Queue,
    pipeline: ComputePipeline,
    /// Largest buffer that a shader can see.
    largest: u64,
    /// What the driver complained of; nothing it computed afterwards is sent.
    fault: Mutex<Option<String>>,
}

impl Wgpu {
    /// The fastest GPU that Vulkan shows; one in software if there is no other.
    ///
    /// # Errors
    /// [`BackendError::Device`] if there is none, or it does not start.
    pub async fn new() -> Result<Wgpu, BackendError> {
        let mut description = wgpu::InstanceDescriptor::new_without_display_handle();
        description.backends = wgpu::Backends::VULKAN;
        let instance = wgpu::Instance::new(description);
        let adapter = instance.request_adapter(&wgpu::RequestAdapterOptions {
            power_preference: PowerPreference::HighPerformance,
            ..wgpu::RequestAdapterOptions::default()
        });
        let none = "there is no Vulkan driver here (for one in software: mesa-vulkan-drivers)";
        let adapter = adapter
            .await
            .map_err(|_| BackendError::Device(none.into()))?;
        let limits = adapter.limits();
        let opened = adapter.request_device(&wgpu::DeviceDescriptor {
            required_limits: limits.clone(),
            ..wgpu::DeviceDescriptor::default()
        });
        let (device, queue) = opened
            .await
            .map_err(|error| BackendError::Device(format!("the GPU does not start: {error}")))?;
        let module = device.create_shader_module(ShaderModuleDescriptor {
            label: None,
            source: ShaderSource::Wgsl(Cow::Borrowed(include_str!("wgpu/product.wgsl"))),
        });
        let pipeline = device.create_compute_pipeline(&ComputePipelineDescriptor {
            label: None,
            layout: None,
            module: &module,
            entry_point: Some("multiply"),
            compilation_options: wgpu::PipelineCompilationOptions::default(),
            cache: None,
        });
        let shared = Arc::new(Shared {
            device,
            queue,
            pipeline,
            largest: limits
                .max_storage_buffer_binding_size
                .min(limits.max_buffer_size),
            fault: Mutex::default(),
        });
        let noting = Arc::downgrade(&shared);
        shared
            .device
            .on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
                if let Some(shared) = noting.upgrade() {
                    *shared.fault() = Some(error.to_string());
                }
            }));
        let info = adapter.get_info();
        let hardware = info.device_type != wgpu::DeviceType::Cpu;
        let words = info.name;
        let name: String = words
            .chars()
            .filter(char::is_ascii_alphanumeric)
            .take(24)
            .collect();
        let name = format!("wgpu-{name}");
        Ok(Wgpu {
            shared,
            name,
            hardware,
        })
    }
}

impl Shared {
    fn fault(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails if the driver complained, now or before.
    fn check(&self) -> Result<(), BackendError> {
        match &*self.fault() {
            None => Ok(()),
            Some(fault) => Err(BackendError::Device(fault.clone())),
        }
    }

    fn buffer(&self, size: u64, usage: BufferUsages) -> Buffer {
        self.device.create_buffer(&BufferDescriptor {
            label: None,
            size,
            usage,
            mapped_at_creation: false,
        })
    }

    fn filled(&self, contents: &[u8], usage: BufferUsages) -> Buffer {
        self.device.create_buffer_init(&BufferInitDescriptor {
            label: None,
            contents,
            usage,
        })
    }
}

impl Device for Wgpu {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn is_hardware(&self) -> bool {
        self.hardware
    }

    fn bytes(&self, shape: Shape) -> Option<u64> {
        let bytes = u64::from(shape.rows) * row_bytes(shape);
        (bytes <= self.shared.largest).then_some(bytes)
    }

    fn open(&self, field: Field) -> Result<Box<dyn Backend>, BackendError> {
        self.shared.check()?;
        Ok(Box::new(WgpuBackend {
            shared: Arc::clone(&self.shared),
            field,
            matrices: Vec::new(),
        }))
    }
}

/// Of a row of weights or digits, in whole words.
fn row_bytes(shape: Shape) -> u64 {
    u64::from(shape.columns).next_multiple_of(4)
}

struct WgpuBackend {
    shared: Arc<Shared>,
    field: Field,
    matrices: Vec<(Shape, Buffer)>,
}

impl Backend for WgpuBackend {
    fn load(&mut self, shape: Shape, weights: &[i8]) -> Result<(), BackendError> {
        let (columns, bytes) = (shape.columns as usize, row_bytes(shape) as usize);
        let all = u64::from(shape.rows) * row_bytes(shape);
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_DST;
        let buffer = self.shared.buffer(all, usage);
        self.shared.check()?;
        // In pieces, so that little is held twice.
        let at_once = ((1 << 20) / bytes).max(1);
        let mut piece = Vec::new();
        for (i, rows) in weights.chunks(columns * at_once).enumerate() {
            piece.clear();
            for row in rows.chunks(columns) {
                piece.extend(row.iter().map(|w| *w as u8));
                piece.resize(piece.len().next_multiple_of(4), 0);
            }
            let offset = (i * at_once * bytes) as u64;
            self.shared.queue.write_buffer(&buffer, offset, &piece);
            self.shared.queue.submit([]);
        }
        self.shared.check()?;
        self.matrices.push((shape, buffer));
        Ok(())
    }

    fn multiply(
        &mut self,
        matrix: u32,
        elements: &[u32],
        out: &mut Vec<u32>,
    ) -> Result<(), BackendError> {
        let (shape, weights) = self
            .matrices
            .get(matrix as usize)
            .ok_or(BackendError::NoMatrix(matrix))?;
        let shared = &self.shared;
        let columns = shape.columns as usize;
        let rows = elements.len() / columns;
        let digits = self.digits(elements, columns);
        let parameters = [
            row_bytes(*shape) as u32 / 4,
            shape.rows,
            rows as u32,
            MOST_GROUPS,
            self.field.modulus(),
            self.field.bits(),
            (1u64 << self.field.bits()).wrapping_sub(self.field.modulus().into()) as u32,
            0,
        ];
        let parameters: Vec<u8> = parameters.into_iter().flat_map(u32::to_le_bytes).collect();
        let size = (rows * shape.rows as usize * 4) as u64;
        let parameters = shared.filled(&parameters, BufferUsages::UNIFORM);
        let digits = shared.filled(&digits, BufferUsages::STORAGE);
        let product = shared.buffer(size, BufferUsages::STORAGE | BufferUsages::COPY_SRC);
        let read = shared.buffer(size, BufferUsages::MAP_READ | BufferUsages::COPY_DST);
        let buffers = [&parameters, weights, &digits, &product];
        let entries: Vec<_> = (0..)
            .zip(buffers)
            .map(|(binding, buffer)| BindGroupEntry {
                binding,
                resource: buffer.as_entire_binding(),
            })
            .collect();
        let group = shared.device.create_bind_group(&BindGroupDescriptor {
            label: None,
            layout: &shared.pipeline.get_bind_group_layout(0),
            entries: &entries,
        });
        let description = CommandEncoderDescriptor::default();
        let mut encoder = shared.device.create_command_encoder(&description);
        {
            let mut pass = encoder.begin_compute_pass(&ComputePassDescriptor::default());
            pass.set_pipeline(&shared.pipeline);
            pass.set_bind_group(0, &group, &[]);
            pass.dispatch_workgroups(
                shape.rows.min(MOST_GROUPS),
                shape.rows.div_ceil(MOST_GROUPS),
                (rows as u32).div_ceil(ROWS),
            );
        }
        encoder.copy_buffer_to_buffer(&product, 0, &read, 0, size);
        let submission = shared.queue.submit([encoder.finish()]);
        // Its outcome shows when the range is asked for.
        read.map_async(MapMode::Read, .., |_| ());
        let failed = |error: &dyn std::fmt::Display| BackendError::Device(error.to_string());
        let waited = shared.device.poll(PollType::Wait {
            submission_index: Some(submission),
            timeout: Some(PATIENCE),
        });
        waited.map_err(|error| failed(&error))?;
        shared.check()?;
        let bytes = read.get_mapped_range(..).map_err(|error| failed(&error))?;
        out.clear();
        out.extend(
            bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|word| u32::from_le_bytes(*word)),
        );
        Ok(())
    }
}

impl WgpuBackend {
    /// Rows of digits in whole words.
    fn digits(&self, elements: &[u32], columns: usize) -> Vec<u8> {
        let mut split = vec![0; columns * DIGITS];
        let bytes = columns.next_multiple_of(4);
        let mut digits = Vec::with_capacity(elements.len() / columns * DIGITS * bytes);
        for row in elements.chunks(columns) {
            self.field.split_row(row, &mut split);
            for split in split.chunks(columns) {
                digits.extend(split.iter().map(|d| *d as u8));
                digits.resize(digits.len().next_multiple_of(4), 0);
            }
        }
        digits
    }
}
