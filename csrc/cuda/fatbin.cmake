# cmake -DSOURCE=... -DOUTPUT=... -P fatbin.cmake: CUDA kernels as machine code for several architectures, by nvcc. Where there is
# none, or it fails, no_fatbin.txt beside OUTPUT says so, and that is no error. DISA_FAST_CUDA=0 in the environment: it is not run.
cmake_minimum_required(VERSION 3.20)
get_filename_component(folder ${OUTPUT} DIRECTORY)
set(why_not ${folder}/no_fatbin.txt)
file(REMOVE ${OUTPUT} ${why_not})

if("$ENV{DISA_FAST_CUDA}" STREQUAL "0")
  file(WRITE ${why_not} "DISA_FAST_CUDA was 0\n")
  return()
endif()

find_program(NVCC NAMES $ENV{CUDACXX} nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
if(NOT NVCC)
  set(reason "no nvcc: neither CUDACXX nor in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda\n")
  message(STATUS "CUDA kernels are not compiled: ${reason}")
  file(WRITE ${why_not} ${reason})
  return()
endif()

# Code for sm_80 runs on 8.x (but not on Tegra's 8.7), that for sm_100 on 10.x, that for sm_90a on 9.0 only. For all others the
# driver compiles the PTX: of compute_80, since the kernels need nothing newer and PTX runs on whatever is newer.
set(architectures -gencode "arch=compute_80,code=[sm_80,compute_80]")
execute_process(COMMAND ${NVCC} --list-gpu-code OUTPUT_VARIABLE known ERROR_QUIET)
string(REGEX MATCHALL "sm_[0-9]+" known "${known}")
if("sm_90" IN_LIST known)
  list(APPEND architectures -gencode arch=compute_90a,code=sm_90a)
endif()
if("sm_100" IN_LIST known)
  list(APPEND architectures -gencode arch=compute_100,code=sm_100)
endif()

# Not compressed: how nvcc does that changes, and older drivers cannot read it. A wheel is compressed anyway.
# The host's compiler does no more than preprocess, so it may be one that this nvcc does not know.
set(options -std=c++17 -O3 --no-compress --threads 0 -allow-unsupported-compiler)
set(command ${NVCC} -fatbin ${options} ${architectures} -o ${OUTPUT} ${SOURCE})
execute_process(COMMAND ${command} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
if(NOT result EQUAL 0)
  file(REMOVE ${OUTPUT})
  string(JOIN " " command ${command})
  set(reason "${command}\n${output}${result}\n")
  message(WARNING "CUDA kernels are not compiled: ${reason}")
  file(WRITE ${why_not} "${reason}")
endif()
